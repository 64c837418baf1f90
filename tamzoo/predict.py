"""Pictures to labelled probabilities, through torch or through an exported ONNX file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from tamzoo.images import open_picture
from tamzoo.progress import Progress, silent

BATCH = 64  # pictures a forward pass


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What turns a batch of pictures into logits, with what it needs to know about them.

    Attributes:
        run: float32 (n, 3, h, w), or uint8 (n, h, w, 3) where `raw`, to logits (n, classes).
        labels: Class names, or None where the classes have only numbers.
    """

    run: Callable[[np.ndarray], np.ndarray]
    labels: Sequence[str] | None
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    raw: bool = False


def torch_classifier(model: nn.Module) -> Classifier:
    """A timm model in eval mode as a classifier, with the data configuration that it carries."""
    config: dict[str, Any] = resolve_model_data_config(model)

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()

    return Classifier(
        run=run,
        labels=model.pretrained_cfg.get("label_names"),  # pyright: ignore
        **{key: config[key] for key in ("input_size", "mean", "std", "crop_pct")},
    )


def onnx_classifier(session: Any, metadata: dict[str, Any]) -> Classifier:
    """An onnxruntime session of one of our files as a classifier."""
    return Classifier(
        run=lambda batch: session.run(None, {"pixel_values": batch})[0],
        labels=metadata["labels"],
        input_size=tuple(metadata["input_size"]),
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        raw=metadata["input"].startswith("uint8"),
    )


def predict(
    classifier: Classifier, paths: Sequence[Path], top: int = 5, progress: Progress = silent
) -> list[list[tuple[str, float]]]:
    """The `top` likeliest classes of each picture, best first, with their softmax probabilities.

    Raises:
        ValueError: a file that is no usable picture.
    """
    transform: Any = create_transform(
        classifier.input_size,
        interpolation="bicubic",
        mean=classifier.mean,
        std=classifier.std,
        crop_pct=classifier.crop_pct,
        normalize=not classifier.raw,
    )
    answers = []
    for start in progress(range(0, len(paths), BATCH), "Classifying"):
        pictures = [transform(open_picture(path)) for path in paths[start : start + BATCH]]
        batch = np.stack([np.asarray(picture) for picture in pictures])  # (n, 3, h, w)
        logits = classifier.run(
            np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if classifier.raw else batch
        )
        probabilities = torch.from_numpy(logits).softmax(1)
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        answers += [
            [
                (classifier.labels[index] if classifier.labels else str(index), p)
                for index, p in zip(*row, strict=True)
            ]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return answers
