"""Tables 1 and 2 of the paper.

Paper: Tree-structured Attention Module for Image Classification (OpenReview r1xBoxBYDH). Its
errors are of the best test epoch; ours, in the records, are of the last.
"""

from dataclasses import dataclass

PAPER_TITLE = "Tree-structured Attention Module for Image Classification"


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """What a table of the paper says of one entry."""

    table: int
    top1_error: float  # percent, best test epoch
    top5_error: float | None = None  # percent
    params_m: float | None = None  # millions; for TAM not what the paper's own Eq. 2 gives
    flops_g: float | None = None  # multiply-accumulates in units of 2**30


# backbone -> for plain, SE, CBAM, TAM: CIFAR-10 top-1; CIFAR-100 top-1, top-5; M parameters (100 classes);
# G FLOPs where the table gives them
TABLE_1 = {
    "resnet18": (
        (5.32, 24.97, 7.34, 11.22, 0.52),
        (5.31, 24.46, 7.16, 11.31, None),
        (5.28, 24.87, 7.58, 11.31, None),
        (4.94, 24.35, 6.84, 11.22, None),
    ),
    "resnet50": (
        (5.07, 24.84, 7.11, 23.71, 1.22),
        (5.172, 23.68, 6.37, 26.22, None),
        (4.80, 23.67, 6.24, 26.24, None),
        (4.60, 22.42, 5.94, 24.01, None),
    ),
    "resnet101": (
        (4.76, 23.17, 5.94, 42.70, 2.35),
        (4.93, 21.87, 5.53, 47.44, 2.36),
        (4.86, 23.20, 6.11, 47.48, None),
        (4.54, 21.90, 5.75, 43.34, None),
    ),
    "resnext50_32x4d": (
        (5.39, 23.21, 6.29, 23.18, 1.26),
        (4.40, 22.62, 5.70, 25.69, 1.27),
        (4.45, 22.08, 5.76, 25.71, None),
        (4.37, 21.97, 5.64, 23.48, None),
    ),
    "wrn16_8": (
        (4.94, 22.81, 6.18, 11.01, 1.44),
        (4.92, 22.70, 6.05, 11.10, 1.45),
        (4.97, 23.07, 6.15, 11.10, None),
        (4.92, 22.62, 6.11, 11.05, None),
    ),
}
# backbone -> for plain, SE, TAM: SVHN top-1; M parameters (10 classes)
TABLE_2 = {
    "resnet18": ((5.94, 11.18), (4.51, 11.26), (4.29, 11.21)),
    "resnet34": ((4.18, 21.28), (4.52, 21.44), (4.11, 21.36)),
    "resnet50": ((4.46, 23.52), (4.71, 26.04), (3.94, 23.82)),
    "wrn16_8": ((4.28, 10.96), (3.63, 11.05), (3.71, 11.00)),
}
