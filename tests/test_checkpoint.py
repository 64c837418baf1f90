import errno
import hashlib
import os
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import tamzoo  # noqa: F401
from tamzoo.checkpoint import (
    check_output_file,
    check_weights_file,
    load_weights,
    save_weights,
    sha256_of,
    whole_file,
    write_whole,
)


def test_stored_weights_are_half_precision_and_load_back(tmp_path):
    model = timm.create_model("resnet20_tam.cifar10").eval()
    model.layer1[0].se.measured_gate.copy_(torch.tensor([0.123456789, 0.1, 0.2]))
    path = tmp_path / "model.safetensors"
    assert (
        save_weights(path, model.state_dict())
        == sha256_of(path)
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    stored = load_file(path)
    assert stored["conv1.weight"].dtype == torch.float16
    assert stored["layer1.0.se.measured_gate"].dtype == torch.float32, "folding multiplies by it"
    other = timm.create_model("resnet20_tam.cifar10").eval()
    load_weights(other, path, "resnet20_tam.cifar10")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x), rtol=1e-2, atol=1e-2)  # float16 has 11 bits


def test_weights_that_are_not_finite_are_not_stored(tmp_path):
    with pytest.raises(ValueError, match="fc.bias is not finite in float16"):
        save_weights(tmp_path / "model.safetensors", {"fc.bias": torch.tensor([1e6])})
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_unopened(tmp_path):
    path = tmp_path / "model.safetensors"
    for legacy in (False, True):
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="expected safetensors, got a pickle"):
            check_weights_file(path)


@pytest.mark.parametrize(
    "padding", [0, 40]
)  # a header of 64 bytes; of 128, which is 0x80, a pickle's first byte
def test_a_truncated_file_is_refused(tmp_path, padding):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path, {"": " " * padding} if padding else None)
    whole = path.read_bytes()
    assert whole[0] == (128 if padding else 64)
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            check_weights_file(path)


def test_another_file_than_the_catalogues_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    check_weights_file(path, sha256_of(path))
    with pytest.raises(ValueError, match="the catalogue says 000000000000...; fetch it again"):
        check_weights_file(path, "0" * 64)
    with pytest.raises(ValueError, match="expected a safetensors file, found nothing"):
        check_weights_file(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("resnet20_plain.cifar10", "these weights are not of resnet20_tam.cifar10: 126 missing"),
        ("wrn10_4_tam.cifar10", "these weights are not of resnet20_tam.cifar10: .* missing .*unexpected"),
        ("resnet20_tam.cifar100", r"fc.bias is \[100\], expected \[10\]"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, other, message):
    path = tmp_path / "model.safetensors"
    save_weights(path, timm.create_model(other).state_dict())
    with pytest.raises(ValueError, match=message):
        load_weights(timm.create_model("resnet20_tam.cifar10"), path, "resnet20_tam.cifar10")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(timm.create_model("resnet20_tam.cifar10"), path, "resnet20_tam.cifar10")


def test_wrong_weights_given_to_timm_are_refused_with_the_same_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, timm.create_model("resnet20_se.cifar10").state_dict())
    overlay = {"file": str(path)}
    with pytest.raises(ValueError, match="these weights are not of resnet20_tam.cifar10"):
        timm.create_model("resnet20_tam.cifar10", pretrained=True, pretrained_cfg_overlay=overlay)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        timm.create_model("resnet20_tam.cifar10", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "x.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "x.json"
    with pytest.raises(OSError, match=re.escape(f"cannot write {path}: No such file or directory")):
        write_whole(path, "new")


def test_a_folder_that_may_not_be_written_is_seen_before_any_work(tmp_path, monkeypatch):
    check_output_file(tmp_path / "x.onnx")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # nothing is refused to root
    with pytest.raises(ValueError, match=r"cannot write .*x.onnx: you may not write to "):
        check_output_file(tmp_path / "x.onnx")


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"cannot write .*x.bin: No space left on device"),
        whole_file(tmp_path / "x.bin"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
