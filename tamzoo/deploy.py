"""What leaves the zoo: a folded model, what its file tells of it, and the check that every file passes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamzoo import __version__
from tamzoo.attention import GATE_TOLERANCE
from tamzoo.bounds import bound_gates
from tamzoo.checkpoint import check_output_file, whole_file
from tamzoo.data import darkest_and_brightest, normalise
from tamzoo.datasets import DATASETS, Dataset
from tamzoo.fold import FoldReport, reparameterize_model, report_of
from tamzoo.gates import gates_of
from tamzoo.images import random_crops
from tamzoo.progress import Progress, silent

PARITY_IMAGES = 256  # at least
Run = Callable[[Tensor], Tensor]  # what a file takes -> logits (n, classes); a torch model is one


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a file's answers may be from the unfolded torch model's."""

    difference: float  # largest of a logit, absolute
    agreement: float = 1.0  # least share of images with the same top-1


EXACT = Tolerance(difference=1e-3)
FLOAT16 = Tolerance(difference=0.1, agreement=0.99)
INT8 = Tolerance(difference=4.0, agreement=0.9)  # wide: finds what is broken, not what accuracy is lost


@dataclass(frozen=True, kw_only=True)
class Parity:
    """An exported file against the torch model that it came from."""

    program: str  # what ran the file
    n: int
    max_difference: float  # absolute, logits
    same_top1: int
    tolerance: Tolerance = EXACT

    @property
    def passed(self) -> bool:
        agrees = self.same_top1 >= self.tolerance.agreement * self.n
        return agrees and self.max_difference <= self.tolerance.difference

    def __str__(self) -> str:
        least = f" (at least {self.tolerance.agreement:.0%})" if self.tolerance.agreement < 1 else ""
        return (
            f"{self.program} against unfolded torch on {self.n} images: largest logit difference "
            f"{self.max_difference:.2g} (at most {self.tolerance.difference:g}), "
            f"same top-1 on {self.same_top1}{least}"
        )


def check_parity(
    run: Run,
    reference: nn.Module,
    dataset: Dataset,
    pixels: Tensor,
    *,
    program: str,
    uint8: bool = False,
    tolerance: Tolerance = EXACT,
    progress: Progress = silent,
) -> Parity:
    """Compares a file's logits with a torch model's on uint8 (n, 3, h, w) images.

    Args:
        run: The opened file.
        uint8: It takes raw bytes, see `as_input`.
        program: What a message calls whatever runs it.
    """
    largest, same = torch.zeros(()), 0
    for batch in progress(pixels.split(64), "Checking parity"):
        with torch.inference_mode():
            expected = reference(normalise(batch, dataset))
            found = run(as_input(batch, dataset, uint8))
        largest = torch.maximum(largest, (found - expected).abs().max())  # NaN stays NaN, and fails
        same += int((found.argmax(1) == expected.argmax(1)).view(len(batch), -1).all(1).sum())
    return Parity(
        program=program, n=len(pixels), max_difference=largest.item(), same_top1=same, tolerance=tolerance
    )


def as_input(pixels: Tensor, dataset: Dataset, uint8: bool = False) -> Tensor:
    """uint8 (n, 3, h, w) -> normalised float32 of that shape, or raw (n, h, w, 3) where a file takes bytes.

    Contiguous: an exporter would make the strides of its example part of the graph.
    """
    return (pixels.permute(0, 2, 3, 1) if uint8 else normalise(pixels, dataset)).contiguous()


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model of ours made ready for export.

    Attributes:
        name: `architecture.tag`.
        model: What a file computes: folded, unless its gates were to be kept.
        reference: What a file must agree with: the model as it came.
        pixels: uint8 (n, 3, h, w), for the parity check, n >= 256.
        report: What folding did; None where the gates were to be kept.
        told: What a file tells of the model, beside `told_of`.
    """

    name: str
    model: nn.Module
    reference: nn.Module
    dataset: Dataset
    pixels: Tensor
    report: FoldReport | None
    told: dict[str, Any]


def write_checked(
    made: Deployment, path: Path, write: Callable[[Path], object], load: Callable[[Path], Run], **how: Any
) -> Parity:
    """Writes a file that gets its name only if it answers as the deployment's reference does.

    Args:
        how: As for `check_parity`.
    Raises:
        ValueError: too few images, training mode, no such folder, or the parity fails: then there is no file.
    """
    if len(made.pixels) < PARITY_IMAGES:
        raise ValueError(f"the parity check needs at least {PARITY_IMAGES} images, got {len(made.pixels)}")
    if made.reference.training:
        raise ValueError("export needs models in eval mode; call model.eval() first")
    check_output_file(path)
    with whole_file(path) as part:
        write(part)
        parity = check_parity(load(part), made.reference, made.dataset, made.pixels, **how)
        if not parity.passed:
            raise ValueError(f"{path} is not written, the export disagrees with the model: {parity}")
    return parity


def told_of(deployed: nn.Module, dataset: Dataset, uint8: bool = False) -> dict[str, Any]:
    """What every exported file tells about its input and output."""
    return {
        "labels": dataset.class_names,
        "mean": dataset.mean,
        "std": dataset.std,
        "input_size": dataset.input_size,
        "crop_pct": dataset.crop_pct,
        "preprocess": "RGB; shorter side to input_size / crop_pct, bicubic; centre crop; "
        + ("bytes, mean and std are in the graph" if uint8 else "divided by 255, less mean, by std"),
        "input": "uint8 NHWC" if uint8 else "float32 NCHW",
        "gates_left": list(gates_of(deployed)),
    }


def as_texts(told: dict[str, Any]) -> dict[str, str]:
    """Texts as they are, lists and objects as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}


def _with_classes(
    dataset: Dataset, classes: int, cfg: dict[str, Any], labels: Sequence[str] | None
) -> Dataset:
    """The data set with the model's classes, of the names given or of those that its configuration has."""
    names = cfg.get("label_names")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"a model of {classes} classes got {len(labels)} labels; pass one for each")
    if labels is None and names is not None and len(names) == classes:
        labels = names
    return replace(
        dataset,
        num_classes=classes,
        class_names=None if labels is None else tuple(labels),
        counts=dataset.counts if classes == dataset.num_classes else {},
    )


def deployment(
    model: nn.Module,
    *,
    pixels: Tensor | None = None,
    weights_sha256: str = "",
    keep_gates: bool = False,
    tolerance: float = GATE_TOLERANCE,
    labels: Sequence[str] | None = None,
) -> Deployment:
    """Folds a model of ours by the gates that it carries, and collects what its file should tell.

    Of each gate that is folded the report says whether that is proven right for any picture.

    Args:
        model: In eval mode and float32 on the CPU, as `timm.create_model` made it, compiled or not.
        pixels: uint8 (n, 3, h, w) images for the parity check, of the model's size; by default crops of the
            shipped pictures.
        weights_sha256: Of the file that the model's weights are from, where they are from one.
        keep_gates: Do not fold; there is no fold report then.
        labels: The names of the classes, where they are not those that the model's configuration has.
    Raises:
        ValueError: not a model of ours, not in float32, or not of its data set's channels; images that are
            not uint8, or of another size than the model's configuration says; or as `reparameterize_model`.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper gives every gate another name
    cfg: Any = getattr(model, "pretrained_cfg", {})
    if (tag := cfg.get("tag")) not in DATASETS or not hasattr(model, "num_classes"):
        raise ValueError(
            f"expected a model of tamzoo as timm.create_model made it, got {type(model).__name__} "
            f"of tag {tag!r}"
        )
    if others := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"export takes a float32 model, got one in {others.pop()}; pass model.float() "
            "(a file in float16 is made of it by --precision float16)"
        )
    if model.training:
        raise ValueError("export needs models in eval mode; call model.eval() first")
    if others := {parameter.device.type for parameter in model.parameters()} - {"cpu"}:
        raise ValueError(f"export takes a model on the CPU, got one on {others.pop()}; pass model.cpu()")
    name = f"{cfg['architecture']}.{tag}"
    for key, taken in {"interpolation": "bicubic", "crop_mode": "center"}.items():
        if (found := cfg.get(key, taken)) != taken:
            raise ValueError(
                f"{name}: exported files take pictures prepared by {key} {taken!r}, the model's configuration"
                f" says {found!r}; train with {taken!r}"
            )
    dataset = replace(
        DATASETS[tag],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        input_size=tuple(cfg["input_size"]),
        crop_pct=cfg["crop_pct"],
    )
    channels = getattr(model.conv1, "in_channels", model.in_chans)
    if channels != dataset.input_size[0]:
        raise ValueError(
            f"{name}: exported files take pictures of {dataset.input_size[0]} channels, as its data set has; "
            f"this model takes {channels}"
        )
    if pixels is None:
        pixels = random_crops(PARITY_IMAGES, dataset.input_size[-1])
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"{name}: the images to check it on are {pixels.dtype}, expected uint8; pass them as bytes, not "
            "normalised"
        )
    if (size := tuple(pixels.shape[1:])) != dataset.input_size:
        raise ValueError(
            f"{name}: the images to check it on are {size}, the model's configuration says "
            f"{dataset.input_size}; pass pixels of that size, or create the model with another input_size"
        )
    report, deployed = None, model
    if not keep_gates:
        deployed = reparameterize_model(model, tolerance=tolerance)
        report = report_of(deployed)
    with torch.inference_mode():  # its head may be another one than it was made with
        classes = deployed(normalise(pixels[:1], dataset)).shape[1]
    dataset = _with_classes(dataset, classes, cfg, labels)
    if report and (bounds := bound_gates(model, *darkest_and_brightest(dataset))):
        proven = (
            name
            for name, constant in report.folded.items()
            if max(*bounds[name], constant) - min(*bounds[name], constant) <= GATE_TOLERANCE
        )
        report = replace(report, proven=tuple(proven))
    told = {
        "entry": name,
        "version": __version__,
        "weights_sha256": weights_sha256,
        "gates": report.folded if report else {},
        "fold_report": str(report) if report else "exported with its gates",
    }
    return Deployment(
        name=name,
        model=deployed,
        reference=model,
        dataset=dataset,
        pixels=pixels,
        report=report,
        told=told,
    )
