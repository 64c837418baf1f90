"""Pictures from files: checked, never converted in silence; and the pictures that the package ships."""

import errno
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PICTURES = Path(__file__).parent / "pictures"
# What Pillow hands to another program (a PostScript program need not end), only recognises or only writes
UNREAD = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PALM"}
SUFFIXES = frozenset(end for end, kind in Image.registered_extensions().items() if kind not in UNREAD)
COMMON = ("JPEG", "PNG", "WEBP")  # tried first: Pillow asks its formats one by one
_NAMES = ("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT")
SYSTEM = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}  # Windows lacks some
SMALLEST = 8  # pixels a side; less than this shows nothing
LONGEST = 100  # sides of a picture, the longer over the shorter
READABLE = "expected a JPEG, PNG, WebP or another format that Pillow reads"
ADVICE = {
    "RGBA": "its transparent pixels have no colour; flatten it on a background first",
    "LA": "its transparent pixels have no colour; flatten it on a background first",
    "PA": "its transparent pixels have no colour; flatten it on a background first",
    "CMYK": "convert it to sRGB with its colour profile first",
}


def of_system(error: BaseException) -> bool:
    """Whether the machine is short of something, or a disk fails, whatever the picture."""
    return getattr(error, "errno", None) in SYSTEM


def open_picture(path: Path) -> Image.Image:
    """A picture from a file.

    Raises:
        ValueError: no such file, or as `decode_picture`.
        OSError: as there.
    """
    try:
        wrong = None if path.is_file() else "a folder" if path.is_dir() else "no such file"
    except OSError as error:
        if of_system(error):
            raise
        # a name that is too long, as where a column holds base64 and no paths
        raise ValueError(f"{str(path)[:60]}...: expected a picture, found {error.strerror}") from error
    if wrong:
        raise ValueError(f"{path}: expected a picture, found {wrong}")
    return decode_picture(path, str(path))


def decode_picture(source: Path | BinaryIO, name: str) -> Image.Image:
    """A still 8-bit picture as RGB, upright; grey, palette and opaque RGBA pictures are converted, which
    loses nothing. Of a colour PNG's 16 bits a channel Pillow gives the upper eight.

    Args:
        name: What the picture is called in a message.
    Raises:
        ValueError: not an image, damaged, animated, tiny, huge, a strip, or of a mode whose conversion would
            have to guess (transparency, CMYK, grey of 16 bits).
        OSError: no more files can be opened, the disk fails: nothing that a picture is to blame for.
    """
    try:
        with _opened(source) as image:
            # a phone's MPO is a still JPEG, and beside it a smaller one or one of another lens
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames == 1:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture; {READABLE}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too large for a picture ({error}); make it smaller first") from error
    except MemoryError as error:
        raise ValueError(f"{name}: too large for the memory that is left; make it smaller first") from error
    except Exception as error:  # a damaged file makes Pillow's decoders fail in any way
        if of_system(error):
            raise
        raise ValueError(f"{name}: a damaged picture ({error}); {READABLE}") from error
    if frames > 1:
        raise ValueError(f"{name}: animated, {frames} frames; save one frame as a picture")
    if min(image.size) < SMALLEST:
        raise ValueError(
            f"{name}: {image.width}x{image.height} pixels; expected at least {SMALLEST}x{SMALLEST}"
        )
    if max(image.size) > LONGEST * min(image.size):  # resized by its shorter side, it would fill the memory
        raise ValueError(
            f"{name}: {image.width}x{image.height} pixels; expected one side at most {LONGEST} times as "
            "long as the other; cut it first"
        )
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):  # which no pixel need have
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] == 255:  # opaque, as of screens
        image = image.convert(image.mode[:-1])
    if image.mode not in ("RGB", "L", "P", "1"):
        advice = ADVICE.get(image.mode, "save it with 8 bits a channel first")
        raise ValueError(f"{name}: expected an 8-bit RGB or grey picture, got mode {image.mode}; {advice}")
    return image if image.mode == "RGB" else image.convert("RGB")


def _opened(source: Path | BinaryIO) -> Image.Image:
    try:
        return Image.open(source, formats=COMMON)
    except UnidentifiedImageError:
        return Image.open(source, formats=[kind for kind in Image.OPEN if kind not in UNREAD])


def shipped_pictures() -> list[Path]:
    return sorted(PICTURES.glob("*.jpg"))


def random_crops(n: int, size: int, seed: int = 0) -> Tensor:
    """Test inputs for any classifier: three quarters crops of the shipped pictures, one quarter noise.

    Returns:
        uint8 (n, 3, size, size).
    """
    draw = np.random.default_rng(seed)
    pictures = [open_picture(path) for path in shipped_pictures()] if n else []
    crops = []
    for index in range(n):
        if index % 4 == 3:
            crops.append(draw.integers(0, 256, (size, size, 3), dtype=np.uint8))
            continue
        picture = pictures[index % len(pictures)]
        side = int(draw.integers(min(32, *picture.size), min(picture.size) + 1))
        left, top = (int(draw.integers(0, extent - side + 1)) for extent in picture.size)
        crops.append(np.asarray(picture.crop((left, top, left + side, top + side)).resize((size, size))))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
