"""Where decoded data and compiled kernels are kept."""

import os
import stat
import sys
from pathlib import Path


def program_folder(name: str) -> Path:
    """A folder of the cache for compiled programs, made where it is missing: what lies there is run.

    Raises:
        ValueError: others may write to it; or as `cache_folder`.
        OSError: it cannot be made.
    """
    if not hasattr(os, "getuid"):  # on Windows the cache is the user's own
        folder = cache_folder() / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = cache_folder() / f"{name}-{os.getuid()}"  # a cache may be shared
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(f"{folder}: others may write there, and its programs are run; remove it")
    return folder


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
