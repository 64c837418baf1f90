"""Pictures to labelled probabilities, through torch or through an ONNX file."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from tamzoo.checkpoint import sha256_of
from tamzoo.images import open_picture
from tamzoo.onnx_export import lacks, metadata_of, onnx_libraries, open_session
from tamzoo.progress import Progress, silent

BATCH = 64  # pictures a forward pass
PROBE = 3  # pictures of the run that shows a graph's classes; exporters bake in a batch of 1 or 2
NO_PROBABILITIES = "the model's logits for it hold NaN or infinity; check the model's weights"
Triple = tuple[float, float, float]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What turns pictures into probabilities, with what it needs to know about them.

    Attributes:
        run: float32 (n, 3, h, w), or uint8 (n, h, w, 3) where `raw`, to logits (n, classes).
        labels: Class names, or None where the classes have only numbers.
        sha256: Of its weights and of what is told here, so that a job knows its model again.
    """

    run: Callable[[np.ndarray], np.ndarray]
    labels: Sequence[str] | None
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    raw: bool = False
    sha256: str = ""

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """An RGB picture, resized and cropped: uint8 (h, w, 3)."""
        _, h, w = self.input_size
        if self.crop_pct == 1 and picture.size == (w, h):  # timm's transform would only take its time
            return np.asarray(picture)
        return np.asarray(self._crop(picture)).transpose(1, 2, 0)  # (3, h, w) -> (h, w, 3)

    def best(self, pixels: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest classes of uint8 (n, h, w, 3) pixels, best first, and their softmax probabilities.

        Returns:
            Indices and probabilities, each (n, k), k the smaller of `top` and the number of classes; NaN
            where the logits are no numbers.
        """
        logits = torch.from_numpy(self.run(pixels if self.raw else self._normalised(pixels)))
        found = logits.float().softmax(1).topk(min(top, logits.shape[1]), dim=1)
        return found.indices.numpy(), found.values.numpy()

    def label(self, index: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.labels[index] if self.labels else str(index)

    @cached_property
    def _crop(self) -> Any:
        how: Any = {"interpolation": self.interpolation, "crop_mode": self.crop_mode}
        return create_transform(self.input_size, crop_pct=self.crop_pct, normalize=False, **how)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        """In numpy: torch would start threads of its own beside each thread that predicts."""
        x = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")  # (n, h, w, 3) -> (n, 3, h, w)
        mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in (self.mean, self.std))
        x /= 255
        x -= mean
        x /= std
        return x


def torch_classifier(model: nn.Module) -> Classifier:
    """A timm model in eval mode as a classifier, with the data configuration that it carries."""
    config: dict[str, Any] = resolve_model_data_config(model)

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()

    keys = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    told = {key: config[key] for key in keys}
    labels: Any = model.pretrained_cfg.get("label_names")  # pyright: ignore
    told["labels"] = labels if labels and len(labels) == model.num_classes else None
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    return Classifier(run=run, sha256=_identity(weights.hexdigest(), told), **told)


def onnx_classifier(session: Any, metadata: dict[str, Any], name: str = "the ONNX file") -> Classifier:
    """An onnxruntime session as a classifier; it is run once, since a graph need not tell its output's shape.

    Args:
        metadata: What `metadata_of` one of our files tells, or the same keys from elsewhere.
        name: What the file is called in a message.
    Raises:
        ValueError: the metadata are damaged; the graph takes other inputs than they say, has another number
            of classes, or does not run on a batch of any size.
    """
    _check_metadata(metadata, name)
    size, raw = _input_of(session)
    told = tuple(metadata["input_size"])
    if told != size or raw != metadata["input"].startswith("uint8"):
        raise ValueError(
            f"{name}: the ONNX graph takes {size} as {'uint8' if raw else 'float'}, its metadata say "
            f"{told} as {metadata['input']}; export it again"
        )
    run, (c, h, w) = _runner(session, name), size
    labels = metadata["labels"]
    scores = np.shape(run(np.zeros((PROBE, h, w, c) if raw else (PROBE, c, h, w))))
    if len(scores) != 2 or scores[0] != PROBE:
        raise ValueError(
            f"{name}: expected an ONNX graph whose first output is logits (n, classes) of any batch size n, "
            f"got {scores} for a batch of {PROBE}; export it again with a free batch axis"
        )
    if labels is not None and len(labels) != scores[1]:
        raise ValueError(
            f"{name}: the ONNX graph has {scores[1]} classes, but there are {len(labels)} labels"
        )
    return Classifier(
        run=run,
        labels=labels,
        input_size=size,
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        crop_pct=float(metadata.get("crop_pct", 1.0)),  # not told by files of old
        raw=raw,
    )


def _check_metadata(metadata: dict[str, Any], name: str) -> None:
    labels, std = metadata["labels"], metadata["std"]
    kinds = {
        "mean": (_are_three_numbers(metadata["mean"]), "three numbers"),
        "std": (_are_three_numbers(std) and min(std) > 0, "three positive numbers"),
        "input_size": (_are_three_numbers(metadata["input_size"]), "three numbers"),
        "input": (isinstance(metadata["input"], str), "a text"),
        "labels": (
            labels is None or (isinstance(labels, list) and all(isinstance(label, str) for label in labels)),
            "a list of texts",
        ),
        "crop_pct": (_is_positive(metadata.get("crop_pct", 1.0)), "a positive number"),
    }
    for key, (fits, kind) in kinds.items():
        if not fits:
            raise ValueError(
                f"{name}: {key} in its metadata is {metadata[key]!r}, expected {kind}; export it again"
            )


def _is_positive(found: Any) -> bool:
    try:
        return 0 < float(found) < inf
    except (TypeError, ValueError):
        return False


def _are_three_numbers(found: Any) -> bool:
    fits = isinstance(found, list | tuple) and len(found) == 3
    return fits and all(isinstance(each, int | float) and isfinite(each) for each in found)


def _runner(session: Any, name: str) -> Callable[[np.ndarray], np.ndarray]:
    feed, kind = session.get_inputs()[0].name, _TYPES[session.get_inputs()[0].type]

    def run(batch: np.ndarray) -> np.ndarray:
        try:
            return session.run(None, {feed: batch.astype(kind, copy=False)})[0]
        except Exception as error:  # onnxruntime has a class an error code, none of them public
            raise ValueError(
                f"{name}: onnxruntime cannot run it on a batch of {len(batch)} "
                f"({' '.join(str(error).split())}); export it again with a free batch axis"
            ) from error

    return run


def open_classifier(
    path: Path,
    threads: int = 0,
    mean: Triple | None = None,
    std: Triple | None = None,
    labels: Path | None = None,
) -> Classifier:
    """An ONNX file as a classifier.

    Args:
        threads: As for `open_session`.
        mean: With `std`, of the channels in [0, 1], for a file that was not exported by tamzoo and takes
            floats.
        labels: A file with a class name a line, in place of the names that the ONNX file carries.
    Raises:
        ValueError: not an ONNX file, one from elsewhere that takes floats and no mean and std, another
            with them, unfit mean, std or labels, or as `onnx_classifier`.
    """
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std belong together; pass both or neither")
    if mean and std and not (all(0 <= each <= 1 for each in mean) and all(0 < each <= 1 for each in std)):
        raise ValueError(
            "--mean and --std are of pixels scaled to 0..1: expected 0 <= mean <= 1 and 0 < std <= 1, "
            f"got {mean} and {std}; divide those of 0..255 by 255"
        )
    session = open_session(path, threads)
    foreign = bool(lacks(session))
    size, raw = _input_of(session) if foreign else ((), False)
    if mean and (raw or not foreign):
        raise ValueError(
            f"{path}: --mean and --std are for an ONNX file from elsewhere that takes floats; this one "
            f"{'takes bytes' if raw else 'tells its own'}; leave them out"
        )
    if raw or mean:
        kind = "uint8 NHWC" if raw else "float32 NCHW"
        metadata = {"labels": None, "input_size": size, "input": kind}
        metadata |= {"mean": mean or (0.0,) * 3, "std": std or (1.0,) * 3}  # bytes need neither
    else:
        metadata = metadata_of(session)
    if labels is not None:
        metadata["labels"] = read_labels(labels)
    classifier = onnx_classifier(session, metadata, str(path))
    told = {"labels": classifier.labels, "mean": classifier.mean, "std": classifier.std}
    return replace(classifier, sha256=_identity(_weights_of(path), told))


def _weights_of(path: Path) -> str:
    """The hash of an ONNX file, with those of the files in which it keeps its weights, where it has such."""
    onnx, _ = onnx_libraries()
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's, of which onnx tells nothing
        raise ValueError(f"{path}: expected an ONNX file, not one in onnxruntime's own format") from error
    beside = {
        item.value for tensor in graph.initializer for item in tensor.external_data if item.key == "location"
    }
    for name in beside:
        where = PurePath(name)
        if where.is_absolute() or ".." in where.parts or not (path.parent / where).is_file():
            raise ValueError(f"{path}: expected its weights in a file beside it, not in {name!r}")
    return "".join(sha256_of(file) for file in (path, *(path.parent / name for name in sorted(beside))))


def read_labels(path: Path) -> list[str]:
    """Class names, one a line.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a class name a line in UTF-8 ({error}); save it so") from error


def _identity(weights: str, told: dict[str, Any]) -> str:
    return hashlib.sha256((weights + json.dumps(told)).encode()).hexdigest()


def _input_of(session: Any) -> tuple[tuple[int, int, int], bool]:
    """The (3, h, w) that an ONNX graph takes, and whether as raw bytes (n, h, w, 3)."""
    inputs: list[Any] = session.get_inputs()
    kind, shape = (inputs[0].type, inputs[0].shape) if len(inputs) == 1 else ("", [])
    raw = kind == "tensor(uint8)"
    size: Any = tuple(shape[3:] + shape[1:3] if raw else shape[1:])
    fits = len(size) == 3 and size[0] == 3 and all(isinstance(extent, int) for extent in size)
    if not fits or isinstance(shape[0], int) or kind not in _TYPES:
        found = ", ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
        raise ValueError(
            "expected an ONNX graph with one input of any batch size, floats (n, 3, h, w) or uint8 "
            f"(n, h, w, 3), with h and w fixed; got {found or 'none'}"
        )
    return size, raw


def _raise(path: Path, error: Exception) -> None:
    raise error


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    top: int = 5,
    progress: Progress = silent,
    refuse: Callable[[Path, Exception], None] = _raise,
) -> list[list[tuple[str, float]]]:
    """The `top` likeliest classes of each picture, best first, with their softmax probabilities.

    Args:
        refuse: Called with a file that gets no answer, and why; where it returns, the answer is empty.
    Raises:
        ValueError: a file that is no usable picture, or of which the model makes no probabilities.
        OSError: a file that may not be read.
    """
    answers: list[list[tuple[str, float]]] = [[] for _ in paths]
    for start in progress(range(0, len(paths), BATCH), "Classifying"):
        places, batch = [], []
        for place in range(start, min(start + BATCH, len(paths))):
            try:
                batch.append(classifier.pixels(open_picture(paths[place])))
                places.append(place)
            except (ValueError, OSError) as error:
                refuse(paths[place], error)
        if not batch:
            continue
        for place, indices, probabilities in zip(places, *classifier.best(np.stack(batch), top), strict=True):
            if np.isnan(probabilities).any():
                refuse(paths[place], ValueError(f"{paths[place]}: {NO_PROBABILITIES}"))
                continue
            labels = map(classifier.label, indices.tolist())
            answers[place] = list(zip(labels, probabilities.tolist(), strict=True))
    return answers
