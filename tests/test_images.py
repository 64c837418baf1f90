import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tamzoo.images import PICTURES, SUFFIXES, open_picture, random_crops


def saved(tmp_path, name, image, **kwargs):
    image.save(tmp_path / name, **kwargs)
    return tmp_path / name


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_still_8_bit_pictures_open_as_rgb(tmp_path, mode):
    path = saved(tmp_path, "x.png", Image.new("RGB", (20, 10), "red").convert(mode))
    picture = open_picture(path)
    assert picture.mode == "RGB" and picture.size == (20, 10)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_is_left_out(tmp_path, mode):
    picture = Image.new("RGB", (20, 20), "gray")
    found = open_picture(saved(tmp_path, "x.png", picture.convert(mode)))
    assert found.mode == "RGB" and found.tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("RGBA", "x.png", "got mode RGBA; its transparent pixels have no colour; flatten it"),
        ("LA", "x.png", "got mode LA; its transparent pixels"),
        ("CMYK", "x.jpg", "got mode CMYK; convert it to sRGB"),
        ("I;16", "x.png", r"got mode I;16; save it with 8 bits a channel"),
        ("F", "x.tiff", "got mode F; save it with 8 bits a channel"),
    ],
)
def test_modes_that_would_need_a_guess_are_refused(tmp_path, mode, name, message):
    path = saved(tmp_path, name, Image.new(mode, (20, 20)))
    with pytest.raises(ValueError, match=f"{name}: expected an 8-bit RGB or grey picture, {message}"):
        open_picture(path)


@pytest.mark.parametrize(("mode", "colour"), [("P", 0), ("L", 0), ("1", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_is_refused(tmp_path, mode, colour):
    path = saved(tmp_path, "x.png", Image.new(mode, (20, 20)), transparency=colour)
    with pytest.raises(ValueError, match="got mode RGBA"):
        open_picture(path)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", b"\xff\xff"), ("P", 7), ("RGB", (1, 2, 3)), ("L", 7)],
)
def test_a_transparent_colour_that_no_pixel_has_is_no_harm(tmp_path, mode, transparency):
    picture = Image.new("RGB", (20, 20), "white").convert(mode)
    found = open_picture(saved(tmp_path, "x.png", picture, transparency=transparency))
    with Image.open(tmp_path / "x.png") as stored:
        assert "transparency" in stored.info
    assert found.mode == "RGB" and found.tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "x.png: too large for the memory that is left"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    ],
)
def test_what_the_system_lacks_is_no_damage(tmp_path, monkeypatch, error, told):
    path = saved(tmp_path, "x.png", Image.new("RGB", (20, 20)))

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises((ValueError, OSError), match=told) as raised:
        open_picture(path)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_animations_are_refused(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, name, frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f"{name}: animated, 2 frames"):
        open_picture(path)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_open_upright(tmp_path, name, orientation):
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste("red", (0, 0, 20, 10))  # top left
    # how a camera that is held like this stores it: what undoes each orientation (EXIF 2.3, tag 0x0112)
    turn = Image.Transpose
    turns = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM)
    turns += (turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270)
    stored = upright.transpose(turns[orientation - 2]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(saved(tmp_path, name, stored, exif=exif))
    assert picture.size == (40, 20)
    reds = [picture.getpixel(place)[0] > 128 for place in ((5, 5), (35, 5), (5, 15), (35, 15))]
    assert reds == [True, False, False, False]


def test_damaged_exif_is_no_damaged_picture(tmp_path):
    path = saved(tmp_path, "x.jpg", Image.new("RGB", (20, 20)), exif=b"Exif\0\0junk")
    assert open_picture(path).size == (20, 20)


def test_a_still_of_two_lenses_opens_as_the_first(tmp_path):
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    path = saved(tmp_path, "x.mpo", first, save_all=True, append_images=[second])
    picture = open_picture(path.rename(tmp_path / "x.jpg"))
    assert np.asarray(picture).mean((0, 1)) == pytest.approx([255, 0, 0], abs=2)


def test_tiny_pictures_are_refused(tmp_path):
    path = saved(tmp_path, "x.png", Image.new("RGB", (1, 1)))
    with pytest.raises(ValueError, match="x.png: 1x1 pixels; expected at least 8x8"):
        open_picture(path)


def test_a_strip_is_refused_before_it_fills_the_memory(tmp_path):
    path = saved(tmp_path, "x.png", Image.new("1", (10_000, 8)))
    with pytest.raises(
        ValueError, match="x.png: 10000x8 pixels; expected one side at most 100 times as long"
    ):
        open_picture(path)
    assert open_picture(saved(tmp_path, "x.png", Image.new("1", (800, 8)))).size == (800, 8)


def test_too_many_pixels_are_no_damage(tmp_path, monkeypatch):
    path = saved(tmp_path, "x.png", Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="x.png: too large for a picture"):
        open_picture(path)


def test_an_orientation_that_only_xmp_tells_is_seen(tmp_path):
    told = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert open_picture(saved(tmp_path, "x.jpg", Image.new("RGB", (20, 10)), xmp=told)).size == (10, 20)


def test_what_is_no_picture_is_refused(tmp_path):
    text = tmp_path / "x.jpg"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="x.jpg: not a picture; expected a JPEG"):
        open_picture(text)
    whole = (PICTURES / "cat.jpg").read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x.jpg: a damaged picture \(image file is truncated"):
        open_picture(text)
    with pytest.raises(ValueError, match="no such file"):
        open_picture(tmp_path / "missing.png")
    with pytest.raises(
        ValueError, match="^iVBORw0KGgo[a-z0]{49}...: expected a picture, found File name too long"
    ):
        open_picture(Path("iVBORw0KGgo" + "a" * 5000))


def test_what_another_program_would_have_to_read_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("another program ran"))
    endless = tmp_path / "x.jpg"
    endless.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n")
    with pytest.raises(ValueError, match="x.jpg: not a picture; expected a JPEG"):
        open_picture(endless)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".mpo"} < SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".wmf", ".h5", ".mpg"} & SUFFIXES


def test_random_crops_repeat_and_differ():
    crops = random_crops(16, 32)
    assert crops.shape == (16, 3, 32, 32) and crops.dtype == torch.uint8
    assert torch.equal(crops, random_crops(16, 32))
    assert len(np.unique(crops.numpy().reshape(16, -1), axis=0)) == 16
