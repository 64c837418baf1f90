"""A model on a test split: errors, loss and calibration."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tamzoo.data import Split, batches, normalise
from tamzoo.datasets import Dataset
from tamzoo.progress import Progress, silent
from tamzoo.records import Score


def normalised(
    split: Split, dataset: Dataset, batch_size: int, progress: Progress, told: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, as models want it: (n, 3, h, w) float32, channels last, and (n,) int64 labels.

    Args:
        told: What the progress is of.
    """
    for pixels, labels in progress(list(batches(split, batch_size)), told):
        yield normalise(pixels, dataset).contiguous(memory_format=torch.channels_last), labels


@torch.inference_mode()
def logits_of(
    model: Callable[[Tensor], Tensor],
    split: Split,
    dataset: Dataset,
    progress: Progress = silent,
) -> Tensor:
    """Logits of every image in order, float32 (n, classes), from a model or an opened file.

    Raises:
        ValueError: the model is in training mode.
    """
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("evaluation needs a model in eval mode; call model.eval() first")
    shown = normalised(split, dataset, 250, progress, "Evaluating")
    return torch.cat([model(images).float() for images, _ in shown])


@torch.inference_mode()
def golden_logits(model: nn.Module, dataset: Dataset) -> list[float]:
    """Logits of one fixed image, a ramp from -1 to 1, by which a later load is recognised."""
    c, h, w = dataset.input_size
    image = torch.linspace(-1, 1, c * h * w).view(1, c, h, w)
    return [round(value, 5) for value in model(image)[0].float().tolist()]


def score_of(logits: Tensor, labels: Tensor, dataset: Dataset, note: str = "") -> Score:
    """Errors in percent, cross-entropy in nats, and calibration error over 15 equal bins in percent."""
    n = len(labels)
    top5 = logits.topk(5, dim=1).indices == labels.unsqueeze(1)  # (n, 5), best first
    confidence, _ = logits.softmax(dim=1).max(dim=1)
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gap = torch.zeros(15, device=logits.device).index_add_(0, bins, confidence - top5[:, 0].float())
    return Score(
        dataset=dataset.tag,
        n=n,
        top1_error=100 - 100 * top5[:, 0].sum().item() / n,
        top5_error=100 - 100 * top5.sum().item() / n,
        loss=cross_entropy(logits, labels).item(),
        calibration_error=100 * gap.abs().sum().item() / n,
        data_note=note,
    )


def evaluate(model: nn.Module, split: Split, dataset: Dataset, progress: Progress = silent) -> Score:
    """Score of a model on a split.

    Raises:
        ValueError: the model is in training mode, or has another number of classes.
    """
    if (classes := getattr(model, "num_classes", dataset.num_classes)) != dataset.num_classes:
        raise ValueError(
            f"expected a model of {dataset.num_classes} classes, as {dataset.title} has, got one of {classes}"
        )
    return score_of(logits_of(model, split, dataset, progress), split.labels, dataset, split.note)
