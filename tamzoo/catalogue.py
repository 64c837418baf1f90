"""The zoo's entries: each row of the paper's tables and ours, which backbone it has, and which weights."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tamzoo.datasets import DATASETS, Dataset
from tamzoo.paper import TABLE_1, TABLE_2, PaperCell
from tamzoo.weights import TRAINED, Trained

OWNER = "tamzoo"  # of the cards in model_cards
HUB_OWNER = os.environ.get("TAMZOO_HUB_OWNER") or OWNER  # of the repositories that are read and written
ATTENTION_NAMES = ("plain", "se", "cbam", "tam", "scalar")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """An architecture without its attention."""

    name: str
    title: str
    block: str  # "basic", "bottleneck" (post-activation) or "preact" (pre-activation basic)
    layers: tuple[int, ...]  # blocks a stage
    channels: tuple[int, ...]  # planes a stage; a bottleneck block puts out four times as many
    stem_width: int = 64
    cardinality: int = 1
    base_width: int = 64  # width of a bottleneck's 3x3 convolution per group, at 64 planes

    @property
    def num_features(self) -> int:
        """Channels before the classifier."""
        return self.channels[-1] * (4 if self.block == "bottleneck" else 1)

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.channels):
            raise ValueError(f"{self.name}: {len(self.layers)} stages of blocks, {len(self.channels)} widths")


RESNET_CHANNELS = (64, 128, 256, 512)
CIFAR_RESNET_CHANNELS = (16, 32, 64)


def _wide(depth: int, factor: int) -> Backbone:
    """WRN-depth-factor (Zagoruyko & Komodakis, 2016): three stages of (depth - 4) / 6 blocks."""
    return Backbone(
        name=f"wrn{depth}_{factor}",
        title=f"WRN-{depth}-{factor}",
        block="preact",
        layers=((depth - 4) // 6,) * 3,
        channels=(16 * factor, 32 * factor, 64 * factor),
        stem_width=16,
    )


BACKBONES = {
    row.name: row
    for row in (
        Backbone(
            name="resnet18", title="ResNet-18", block="basic", layers=(2, 2, 2, 2), channels=RESNET_CHANNELS
        ),
        Backbone(
            name="resnet34", title="ResNet-34", block="basic", layers=(3, 4, 6, 3), channels=RESNET_CHANNELS
        ),
        Backbone(
            name="resnet50",
            title="ResNet-50",
            block="bottleneck",
            layers=(3, 4, 6, 3),
            channels=RESNET_CHANNELS,
        ),
        Backbone(
            name="resnet101",
            title="ResNet-101",
            block="bottleneck",
            layers=(3, 4, 23, 3),
            channels=RESNET_CHANNELS,
        ),
        Backbone(
            name="resnet152",
            title="ResNet-152",
            block="bottleneck",
            layers=(3, 8, 36, 3),
            channels=RESNET_CHANNELS,
        ),
        Backbone(
            name="resnext50_32x4d",
            title="ResNeXt-50 (32x4d)",
            block="bottleneck",
            layers=(3, 4, 6, 3),
            channels=RESNET_CHANNELS,
            cardinality=32,
            base_width=4,
        ),
        Backbone(
            name="resnext29_8x64d",
            title="ResNeXt-29 (8x64d)",
            block="bottleneck",
            layers=(3, 3, 3),
            channels=RESNET_CHANNELS[:3],
            cardinality=8,
        ),
        _wide(16, 8),
        _wide(28, 10),
        _wide(10, 4),
        Backbone(
            name="resnet20",
            title="ResNet-20 (CIFAR)",
            block="basic",
            layers=(3, 3, 3),
            channels=CIFAR_RESNET_CHANNELS,
            stem_width=16,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the zoo: a backbone with an attention on a data set."""

    backbone: Backbone
    attention: str
    dataset: Dataset
    params: int  # ours; for TAM the paper's figure is another, see PaperCell
    paper: PaperCell | None = None
    trained: Trained | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION_NAMES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_NAMES)}, got {self.attention!r}")

    @property
    def model(self) -> str:
        """timm's architecture name."""
        return f"{self.backbone.name}_{self.attention}"

    @property
    def name(self) -> str:
        """timm's full name, `architecture.tag`."""
        return f"{self.model}.{self.dataset.tag}"

    @property
    def hub_id(self) -> str:
        """The Hub repository; TAMZOO_HUB_OWNER sets the owner."""
        return f"{HUB_OWNER}/{self.name}"


# backbone -> attention -> parameters without the classifier; TAM's as Eq. 2 gives them, 4c - 5 a gate
_PARAMETERS = {
    "resnet18": {"plain": 11_168_832, "se": 11_255_872, "cbam": 11_258_712, "tam": 11_176_472},
    "resnet50": {
        "plain": 23_500_352,
        "se": 26_015_296,
        "cbam": 26_032_944,
        "tam": 23_560_688,
        "scalar": 23_500_368,
    },
    "resnet101": {"plain": 42_492_480, "se": 47_235_648, "cbam": 47_273_492, "tam": 42_622_363},
    "resnext50_32x4d": {"plain": 22_972_224, "se": 25_487_168, "cbam": 25_504_816, "tam": 23_032_560},
    "wrn16_8": {"plain": 10_958_064, "se": 11_044_080, "cbam": 11_046_584, "tam": 10_965_202},
    "resnet34": {"plain": 21_276_992, "se": 21_434_176, "tam": 21_292_016},
    "wrn10_4": {
        "plain": 1_197_168,
        "se": 1_207_920,
        "cbam": 1_208_696,
        "tam": 1_198_945,
        "scalar": 1_197_171,
    },
    "resnet20": {"plain": 271_824, "se": 273_840, "cbam": 275_097, "tam": 273_123, "scalar": 271_833},
}
# ours, beyond the tables: small enough to train on a CPU, and a number in place of each of ResNet-50's gates
_OURS = (
    ("wrn10_4", "tam", "cifar10"),
    ("resnet20", "tam", "cifar10"),
    ("wrn10_4", "plain", "cifar10"),
    ("wrn10_4", "scalar", "cifar10"),
    ("wrn10_4", "se", "cifar10"),
    ("wrn10_4", "cbam", "cifar10"),
    ("resnet20", "plain", "cifar10"),
    ("resnet20", "scalar", "cifar10"),
    ("resnet20", "se", "cifar10"),
    ("resnet20", "cbam", "cifar10"),
    ("resnet50", "scalar", "cifar100"),
)


def _rows() -> Iterator[tuple[str, str, str, PaperCell | None]]:
    for backbone, cells in TABLE_1.items():
        for attention, (c10, c100, c100_top5, params, flops) in zip(ATTENTION_NAMES[:4], cells, strict=True):
            yield backbone, attention, "cifar10", PaperCell(table=1, top1_error=c10)
            cell = PaperCell(table=1, top1_error=c100, top5_error=c100_top5, params_m=params, flops_g=flops)
            yield backbone, attention, "cifar100", cell
    for backbone, cells in TABLE_2.items():
        for attention, (top1, params) in zip(("plain", "se", "tam"), cells, strict=True):
            yield backbone, attention, "svhn", PaperCell(table=2, top1_error=top1, params_m=params)
    for backbone, attention, tag in _OURS:
        yield backbone, attention, tag, None


def _entry(backbone: str, attention: str, tag: str, paper: PaperCell | None) -> Entry:
    row, dataset = BACKBONES[backbone], DATASETS[tag]
    return Entry(
        backbone=row,
        attention=attention,
        dataset=dataset,
        params=_PARAMETERS[backbone][attention] + dataset.num_classes * (row.num_features + 1),
        paper=paper,
        trained=TRAINED.get(f"{backbone}_{attention}.{tag}"),
    )


ENTRIES = {entry.name: entry for entry in (_entry(*row) for row in _rows())}


def _queue() -> Iterator[str]:
    """TAM first, since it is what the zoo is for; then what it is compared with; SVHN and ours last."""
    order = (("resnet18", "cifar10"), ("resnet18", "cifar100"))
    for backbone in ("resnet50", "wrn16_8", "resnext50_32x4d", "resnet101"):
        order += ((backbone, "cifar100"), (backbone, "cifar10"))
    for attention in ("tam", "plain", "se", "cbam"):
        yield from (f"{backbone}_{attention}.{tag}" for backbone, tag in order)
    for attention in ("tam", "plain", "se"):
        yield from (f"{backbone}_{attention}.svhn" for backbone in TABLE_2)
    yield from (f"{backbone}_{attention}.{tag}" for backbone, attention, tag in _OURS)


QUEUE = tuple(_queue())  # names of entries in the order in which they are trained
