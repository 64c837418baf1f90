"""Where decoded data and compiled kernels are kept."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """TAMZOO_CACHE, else the platform's own place; it need not exist.

    Raises:
        ValueError: neither; the user has no home folder.
    """
    if given := os.environ.get("TAMZOO_CACHE"):
        return Path(given)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "tamzoo" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "tamzoo"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tamzoo"
    except RuntimeError as error:
        raise ValueError("this user has no home folder: set TAMZOO_CACHE to a folder for caches") from error
