"""Static gates into the layers before them: a TAM model in, a plain backbone out (paper, section 4.1)."""

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import timm
from torch import nn

from tamzoo.attention import GATE_TOLERANCE
from tamzoo.backbones import blocks_of
from tamzoo.gates import remember_gates
from tamzoo.records import GateStats


@dataclass(frozen=True, kw_only=True)
class FoldReport:
    """What folding did, gate by gate.

    Attributes:
        folded: Gate name -> the constant that went into the layer before it.
        kept: Gate name -> why it is still there.
        tolerance: Largest width that was allowed to be folded.
        proven: The gates of those folded that no picture at all moves further than GATE_TOLERANCE from the
            constant; None where nobody asked.
    """

    folded: dict[str, float]
    kept: dict[str, str]
    tolerance: float
    proven: tuple[str, ...] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} of {len(self.folded) + len(self.kept)} gates folded"]
        if self.proven is not None:
            lines[0] += f", {len(self.proven)} of them proven to be constants for any picture"
        lines += [
            f"  {name}: folded as {constant:.6f}{', proven' * (name in (self.proven or ()))}"
            for name, constant in self.folded.items()
        ]
        lines += [f"  {name}: kept, {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def reparameterize_model(
    model: nn.Module,
    gates: Iterable[GateStats] | None = None,
    tolerance: float = GATE_TOLERANCE,
    inplace: bool = False,
) -> nn.Module:
    """Folds every static gate and removes its module; a gate that is not static stays.

    A fully folded model has exactly the modules and parameters of the plain backbone, and its name. The
    report is in the returned model's `fold_report`.

    Args:
        gates: From `measure_gates`; where None, the measurements that the checkpoint carries.
        tolerance: Largest measured width (maximum - minimum) of a gate that is folded.
        inplace: Change this model in place of a copy.
    Raises:
        ValueError: training mode, no foldable blocks, a tolerance that is no width, unknown gates, or a model
            that cannot be copied.
    """
    if model.training:
        raise ValueError("folding needs a model in eval mode; call model.eval() first")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a width of a gate in [0, 1), got {tolerance}")
    if not blocks_of(model):
        raise ValueError(f"{type(model).__name__} has no blocks that can be folded; pass a tamzoo model")
    if not inplace:
        try:
            model = deepcopy(model)
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot be copied ({error}); where layers are pruned, run it once under "
                "torch.no_grad(), or make their weights permanent by torch.nn.utils.prune.remove"
            ) from error
    if gates is not None:
        remember_gates(model, gates)
    folded: dict[str, float] = {}
    kept: dict[str, str] = {}
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, block in blocks_of(model).items():
        if block.se is not None:
            constant = float(getattr(block.se, "measured_gate", [0.0])[0])
            shared = any(
                users[id(parameter)] > 1 for parameter in getattr(block, block.last_affine).parameters()
            )
            reason = (
                f"{block.last_affine} has weights that are another layer's too"
                if shared
                else block.reparameterize(tolerance)
            )
            if reason is None:
                folded[f"{name}.se"] = constant
            else:
                kept[f"{name}.se"] = reason
    if not kept:
        _call_plain(model)
    model.fold_report = FoldReport(folded=folded, kept=kept, tolerance=tolerance)  # pyright: ignore
    return model


def plain_name(name: str) -> str:
    """`architecture` or `architecture.tag` of the backbone without attention."""
    architecture, dot, tag = name.partition(".")
    return f"{architecture.rpartition('_')[0]}_plain{dot}{tag}"


def _call_plain(model: nn.Module) -> None:
    """Has a model's configuration name the plain backbone, as which timm will load what it saves of it."""
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and timm.is_model(plain := plain_name(cfg.get("architecture", ""))):
        model.pretrained_cfg = model.default_cfg = cfg | {"architecture": plain}  # pyright: ignore
        getattr(model, "_model_args", {}).pop("group_size", None)  # which timm saves, too


def report_of(folded: nn.Module) -> FoldReport:
    """The `fold_report` of a model that `reparameterize_model` returned."""
    report = folded.fold_report
    assert isinstance(report, FoldReport)
    return report
