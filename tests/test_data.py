"""The same images from any file they come in; nothing wrong goes unnoticed."""

import errno
import io
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from PIL import Image

from tamzoo import sources
from tamzoo.data import HUB, data_directory, load_split, normalise
from tamzoo.datasets import DATASETS

COUNTS = {"cifar10": (3,) * 10, "cifar100": (1,) * 100, "svhn": tuple(range(1, 11))}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TAMZOO_DATA", raising=False)


class Small:
    """A data set of a few random images, with a catalogue row that publishes just them."""

    def __init__(self, tag: str) -> None:
        chance = np.random.default_rng(0)
        self.labels = np.repeat(np.arange(len(COUNTS[tag])), COUNTS[tag])
        chance.shuffle(self.labels)
        self.images = chance.integers(0, 256, (len(self.labels), 32, 32, 3), dtype=np.uint8)
        levels = self.images.reshape(-1, 3) / 255
        self.dataset = replace(
            DATASETS[tag],
            counts={"train": COUNTS[tag], "test": COUNTS[tag]},
            pixel_mean=tuple(levels.mean(axis=0)),
            pixel_std=tuple(levels.std(axis=0)),
        )

    def parquet(self, folder: Path, split: str = "train", **columns) -> Path:
        from pyarrow import parquet, table

        folder.mkdir(parents=True, exist_ok=True)
        half = len(self.labels) // 2
        for shard, chosen in enumerate((slice(None, half), slice(half, None))):
            encoded = []
            for image in self.images[chosen]:
                file = io.BytesIO()
                Image.fromarray(image).save(file, "png")
                encoded.append({"bytes": file.getvalue(), "path": None})
            rows = {
                self.dataset.image_column: encoded,
                self.dataset.label_column: self.labels[chosen].tolist(),
            } | {name: values[chosen] for name, values in columns.items()}
            parquet.write_table(table(rows), folder / f"{split}-{shard:05d}-of-00002.parquet")
        return folder

    def binary(self, folder: Path, split: str = "train") -> Path:
        name, files, label_bytes = sources._BINARY[self.dataset.tag]
        (folder / name).mkdir(parents=True, exist_ok=True)
        planes = self.images.transpose(0, 3, 1, 2).reshape(len(self.labels), -1)
        coarse = np.zeros((len(self.labels), label_bytes - 1), dtype=np.uint8)
        records = np.hstack([coarse, self.labels[:, None].astype(np.uint8), planes])
        for file, part in zip(files[split], np.array_split(records, len(files[split])), strict=True):
            part.tofile(folder / name / file)
        return folder

    def python(self, folder: Path, split: str = "train") -> Path:
        """As Python 2 pickled it: byte strings, lists of labels in batches, numpy's array as one string."""
        name, files, key = sources._PYTHON[self.dataset.tag]
        (folder / name).mkdir(parents=True, exist_ok=True)
        planes = self.images.transpose(0, 3, 1, 2).reshape(len(self.labels), -1)
        parts = (np.array_split(array, len(files[split])) for array in (self.labels, planes))
        for file, labels, pixels in zip(files[split], *parts, strict=True):
            pickled = python_2_pickle(key, labels, pixels)
            told = pickle.loads(pickled, encoding="latin1")  # our own bytes: a pickle as torchvision reads it
            assert told[key] == labels.tolist() and np.array_equal(told["data"], pixels)
            (folder / name / file).write_bytes(pickled)
        return folder

    def mat(self, folder: Path, split: str = "train") -> Path:
        from scipy.io import savemat

        folder.mkdir(parents=True, exist_ok=True)
        labels = np.where(self.labels == 0, 10, self.labels)[:, None]
        arrays = {"X": self.images.transpose(1, 2, 3, 0), "y": labels.astype(np.uint8)}
        savemat(folder / f"{split}_32x32.mat", arrays)
        return folder


def python_2_pickle(key: str, labels: np.ndarray, pixels: np.ndarray) -> bytes:
    """File names, coarse labels, labels under `key` and the array of pixels, as protocol 2 wrote them."""

    def string(text: bytes) -> bytes:
        short = len(text) < 256
        return (
            b"U" + struct.pack("<B", len(text)) + text
            if short
            else b"T" + struct.pack("<i", len(text)) + text
        )

    def integer(value: int) -> bytes:
        return b"K" + struct.pack("<B", value) if value < 256 else b"M" + struct.pack("<H", value)

    def listed(items: list[bytes]) -> bytes:
        batches = (b"(" + b"".join(items[at : at + 4]) + b"e" for at in range(0, len(items), 4))
        return b"]q\x03" + b"".join(batches)

    shape = integer(len(pixels)) + integer(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R" + b"(K\x03" + string(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    pairs = {
        "filenames": listed([string(b"a_s_%06d.png" % index) for index in range(len(labels))]),
        "coarse_labels": listed([integer(7) for _ in labels]),
        key: listed([integer(label) for label in labels.tolist()]),
        "data": array,
    }
    return b"\x80\x02}q\x01(" + b"".join(string(k.encode()) + v for k, v in pairs.items()) + b"u."


@pytest.mark.parametrize(
    ("tag", "kind", "inner"),
    [
        ("cifar10", "parquet", ""),
        ("cifar10", "parquet", "cifar10"),
        ("cifar10", "parquet", "plain_text"),
        ("cifar100", "parquet", "cifar100"),
        ("cifar100", "parquet", "cifar100/cifar100"),
        ("svhn", "parquet", "cropped_digits"),
        ("svhn", "parquet", "svhn/cropped_digits"),
        ("cifar10", "binary", ""),
        ("cifar10", "binary", "cifar10"),
        ("cifar100", "binary", ""),
        ("cifar10", "python", ""),
        ("cifar100", "python", "cifar100"),
        ("svhn", "mat", ""),
        ("svhn", "mat", "svhn"),
    ],
)
def test_every_layout_gives_the_same_images(tmp_path, tag, kind, inner):
    small = Small(tag)
    for split in ("train", "test"):
        getattr(small, kind)(tmp_path / inner, split)
        found = load_split(tmp_path, small.dataset, split)
        assert (found.pixels.dtype, found.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), small.images)
        assert np.array_equal(found.labels.numpy(), small.labels)
        assert found.note == ""


def test_images_known_from_a_jpeg_are_told():
    small = Small("cifar10")
    folder = Path(os.environ["TAMZOO_CACHE"]).parent
    small.parquet(folder, source=["jpeg"] * 3 + ["lossless"] * 27)
    for _ in ("decoded", "cached"):
        assert load_split(folder, small.dataset, "train").note == "3 of 30 train images from JPEG"


def test_images_are_decoded_once(tmp_path, monkeypatch):
    small = Small("cifar10")
    small.parquet(tmp_path)
    first = load_split(tmp_path, small.dataset, "train")
    decoded = []
    decode = sources._decode
    monkeypatch.setattr(sources, "_decode", lambda *args: decoded.append(1) or decode(*args))
    second = load_split(tmp_path, small.dataset, "train")
    assert not decoded and torch.equal(first.pixels, second.pixels)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    with cached.open("r+b") as file:  # half of it is lost
        file.truncate(cached.stat().st_size // 2)
    assert torch.equal(load_split(tmp_path, small.dataset, "train").pixels, first.pixels) and decoded
    decoded.clear()
    small.images = 255 - small.images
    small.parquet(tmp_path)
    changed = replace(small.dataset, pixel_mean=tuple(1 - np.asarray(small.dataset.pixel_mean)))
    assert torch.equal(load_split(tmp_path, changed, "train").pixels, 255 - first.pixels) and decoded


def test_a_split_in_the_cache_stays_as_it_is(tmp_path):
    small = Small("cifar10")
    small.binary(tmp_path)
    load_split(tmp_path, small.dataset, "train")
    load_split(tmp_path, small.dataset, "train").pixels.zero_()  # a copy of this process alone
    assert load_split(tmp_path, small.dataset, "train").pixels.any()


def test_without_a_cache_data_still_load(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path / "file"))
    small = Small("svhn")
    assert len(load_split(small.mat(tmp_path / "data"), small.dataset, "train")) == 55


def test_the_hub_is_asked_for_the_pinned_revision(tmp_path, monkeypatch):
    small = Small("cifar10")
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        small.parquet(tmp_path / "snapshot" / "plain_text")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(load_split(data_directory(HUB), small.dataset, "train")) == 30
    assert asked == [
        (
            "uoft-cs/cifar10",
            {
                "repo_type": "dataset",
                "revision": "0b2714987fa478483af9968de7c934580d0bb9a2",
                "allow_patterns": "plain_text/train-*.parquet",
            },
        )
    ]


def test_cifars_python_version_is_read_without_running_what_it_holds(tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    small = Small("cifar100")
    file = small.python(tmp_path) / "cifar-100-python" / "train"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + pickle.dumps(Trap(), protocol=2)[2:-1] + b"0.")
    found = load_split(tmp_path, small.dataset, "train")
    assert np.array_equal(found.labels.numpy(), small.labels) and not ran.exists()
    pickle.loads(file.read_bytes(), encoding="latin1")
    assert ran.exists()  # the trap was one


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz: found an archive.*; unpack it there"):
        load_split(tmp_path, DATASETS["cifar10"], "train")


def test_a_directory_without_data_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"expected train-\*.parquet or cifar-100-python/ or cifar-100-binary/ there or in cifar100/",
    ):
        load_split(tmp_path, DATASETS["cifar100"], "train")
    with pytest.raises(ValueError, match=r"expected test-\*.parquet or test_32x32.mat there or in svhn/"):
        load_split(tmp_path, DATASETS["svhn"], "test")
    with pytest.raises(ValueError, match=r"reads no such data; leave out --data and unset TAMZOO_DATA"):
        load_split(tmp_path, DATASETS["untrained_in1k"], "test")
    with pytest.raises(ValueError, match="no data directory: pass --data DIR or set TAMZOO_DATA"):
        data_directory(None)
    with pytest.raises(ValueError, match="nowhere: expected a directory"):
        data_directory(tmp_path / "nowhere")


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("tag", "kind", "file", "message"),
    [
        ("cifar10", "parquet", "train-00001-of-00002.parquet", "not a whole parquet file"),
        ("cifar10", "binary", "cifar-10-batches-bin/data_batch_3.bin", "expected records of 3073 bytes, got"),
        ("cifar100", "binary", "cifar-100-binary/train.bin", "expected records of 3074 bytes, got"),
        (
            "cifar10",
            "python",
            "cifar-10-batches-py/data_batch_2",
            "not a whole file of CIFAR's Python version",
        ),
        ("svhn", "mat", "train_32x32.mat", "not a whole .mat file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, tag, kind, file, message):
    small = Small(tag)
    getattr(small, kind)(tmp_path)
    damaged(tmp_path / file)
    with pytest.raises(ValueError, match=f"{Path(file).name}: {message}"):
        load_split(tmp_path, small.dataset, "train")


@pytest.mark.parametrize("at", [8, 33])  # the length of the first chunk, and of the second
def test_a_damaged_picture_in_a_shard_is_named(tmp_path, at):
    from pyarrow import parquet, table

    small, name = Small("cifar10"), "train-00001-of-00002.parquet"
    rows = parquet.read_table(small.parquet(tmp_path) / name).to_pylist()
    picture = bytearray(rows[2][small.dataset.image_column]["bytes"])
    picture[at + 3] = 10
    rows[2][small.dataset.image_column]["bytes"] = bytes(picture)
    parquet.write_table(table({key: [row[key] for row in rows] for key in rows[0]}), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}, image 2: expected a PNG, JPEG or WebP"):
        load_split(tmp_path, small.dataset, "train")


def test_a_picture_that_another_program_would_read_or_that_is_huge_is_refused(tmp_path, monkeypatch):
    from pyarrow import parquet, table

    monkeypatch.setattr("subprocess.check_call", None)  # Pillow calls Ghostscript by it
    small, name = Small("cifar10"), "train-00001-of-00002.parquet"
    rows = parquet.read_table(small.parquet(tmp_path) / name).to_pylist()
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    post_script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n%%EOF\n"
    for data, told in ((post_script, "cannot identify"), (huge.getvalue(), "Image size")):
        rows[2][small.dataset.image_column]["bytes"] = data
        parquet.write_table(table({key: [row[key] for row in rows] for key in rows[0]}), tmp_path / name)
        with pytest.raises(ValueError, match=f"image 2: expected a PNG, JPEG or WebP of 32x32.*{told}"):
            load_split(tmp_path, small.dataset, "train")


def test_a_pickle_of_something_else_is_refused(tmp_path):
    file = Small("cifar100").python(tmp_path) / "cifar-100-python" / "train"
    for content, told in [
        ({"data": "x"}, "found 0 labels and 4"),
        ({"fine_labels": [1, 2]}, "found 2 labels"),
    ]:
        file.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=f"train: expected fine_labels and 3072 bytes an image, {told}"):
            load_split(tmp_path, DATASETS["cifar100"], "train")


def test_other_images_than_the_published_are_refused(tmp_path):
    small = Small("cifar10")
    small.binary(tmp_path)
    place = "cifar-10-batches-bin: "
    for change, message in [
        ({"counts": {"train": (3,) * 9 + (4,)}}, "CIFAR-10 has 31 train images, found 30"),
        ({"counts": {"train": (2, *(3,) * 8, 4)}}, "CIFAR-10 has 2 train images of class 0, found 3"),
        ({"pixel_mean": (0.5, 0.5, 0.6)}, r"expected CIFAR-10 of mean \(0.5, 0.5, 0.6\), found 0"),
        ({"pixel_std": (0.2, 0.2, 0.2)}, r"expected CIFAR-10 of std \(0.2, 0.2, 0.2\), found 0.2"),
    ]:
        with pytest.raises(ValueError, match=place + message):
            load_split(tmp_path, replace(small.dataset, **change), "train")
    small.labels[7] = 10
    small.binary(tmp_path)
    with pytest.raises(ValueError, match=r"data_batch_2.bin: expected labels 0 to 9, found . to 10"):
        load_split(tmp_path, small.dataset, "train")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalEntryNotFoundError("no\nnetwork"), r"cannot be reached \(LocalEntryNotFoundError\); check"),
        (HTTPError("gone"), r"cannot be reached \(HTTPError\); check the connection and HF_ENDPOINT"),
        (json.JSONDecodeError("no value", "<html>", 0), "does not answer as a Hub; check HF_ENDPOINT"),
        (KeyError("id"), "does not answer as a Hub; check HF_ENDPOINT"),
        (OSError(errno.ENOSPC, "No space left on device", "blob"), "blob: No space left on device; free or"),
    ],
)
def test_a_hub_without_the_data_is_told_in_a_sentence(monkeypatch, error, told):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=f"^CIFAR-10: .*{told}.*; or pass --data DIR$"):
        load_split(HUB, DATASETS["cifar10"], "test")


def test_a_cache_of_the_other_split_alone_is_told_in_a_sentence(tmp_path, monkeypatch):
    """Without a connection the Hub's library answers with what it has."""
    (tmp_path / "plain_text").mkdir()
    (tmp_path / "plain_text" / "test-00000-of-00001.parquet").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(ValueError, match=r"^CIFAR-10: the Hub cannot be reached, and its train split is not"):
        load_split(HUB, DATASETS["cifar10"], "train")


def test_a_shard_of_something_else_is_refused(tmp_path):
    from pyarrow import parquet, table

    small, file = Small("cifar10"), io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "png")
    whole = file.getvalue()
    for rows, message in [
        ({"image": [b""], "label": [0]}, "no column img, found image, label"),
        (
            {"img": [{"bytes": b"no image", "path": None}], "label": [0]},
            "image 0: expected a PNG, JPEG or WebP",
        ),
        ({"img": [{"bytes": whole}, None], "label": [0, 0]}, "image 1: expected an image, found null"),
        ({"img": [b""], "label": [0]}, "images as structs with bytes in img, found int64 .* and binary"),
        ({"img": [{"path": "x"}], "label": [0]}, "images as structs with bytes .* struct<path: string>"),
        ({"img": [{"bytes": b""}], "label": ["cat"]}, "expected integer labels .*, found string"),
        ({"img": [{"bytes": b""}], "label": [None]}, "found null with 1 nulls"),
    ]:
        parquet.write_table(table(rows), tmp_path / "train-0.parquet")
        with pytest.raises(ValueError, match=f"train-0.parquet.*{message}"):
            load_split(tmp_path, small.dataset, "train")
    file = io.BytesIO()
    Image.new("RGB", (40, 32)).save(file, "png")
    rows = {"img": [{"bytes": file.getvalue(), "path": None}], "label": [0]}
    parquet.write_table(table(rows), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="image 0: expected a PNG, JPEG or WebP of 32x32 pixels, got 40x32"):
        load_split(tmp_path, small.dataset, "train")


def test_the_published_counts_add_up():
    totals = {tag: [sum(DATASETS[tag].counts[split]) for split in ("train", "test")] for tag in COUNTS}
    assert totals == {"cifar10": [50_000, 10_000], "cifar100": [50_000, 10_000], "svhn": [73_257, 26_032]}


def test_svhn_is_only_scaled():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(normalise(pixels, DATASETS["svhn"]), pixels.float() / 255)


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
@pytest.mark.parametrize("tag", ["cifar10", "cifar100"])
def test_the_real_data_are_the_published_ones(tag, split):
    place = REAL / tag if REAL else None
    if place is None or not place.is_dir():
        pytest.skip("TAMZOO_DATA holds no such data")
    found = load_split(place, DATASETS[tag], split)
    assert len(found) == {"train": 50_000, "test": 10_000}[split]


REAL = Path(os.environ["TAMZOO_DATA"]) if os.environ.get("TAMZOO_DATA") else None
