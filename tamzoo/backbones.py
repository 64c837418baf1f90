"""ResNet and ResNeXt with an attention in every residual branch; 32- and 224-pixel stems."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from timm.layers import BatchNormAct2d, GroupNorm, LayerNorm2d
from timm.models import resnet
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tamzoo.attention import GATE_TOLERANCE, TAM, Scalar
from tamzoo.bounds import NORMS
from tamzoo.tree import is_plain

STEMS = ("3x3", "7x7")


class GatedBlock:
    """A residual block that can absorb a static gate into the affine layer right before it."""

    last_affine: ClassVar[str]
    if TYPE_CHECKING:  # torch.jit.script would take them for its own
        se: nn.Module | None  # the attention, under the name that timm gives it
        training: bool

    def reparameterize(self, tolerance: float = GATE_TOLERANCE) -> str | None:
        """Folds the measured gate into the layer before it and removes the attention, in place.

        A gate that does not move is a number, and the layer before it can be scaled by a number
        (paper, section 4.1). `timm.utils.reparameterize_model` calls this on every block.

        Args:
            tolerance: Largest width of the measured gate that is still folded.
        Returns:
            Why the attention stays, or None where nothing stays.
        Raises:
            RuntimeError: the block is in training mode.
        """
        if self.training:
            raise RuntimeError("folding needs a model in eval mode; call model.eval() first")
        if self.se is None:
            return None
        if not isinstance(self.se, (TAM, Scalar)):
            return f"{type(self.se).__name__} depends on its input by design"
        if not is_plain(self.se, TAM, Scalar):
            return (
                f"{type(self.se).__name__} may do more than multiply by its gate: by its type, by a hook "
                "or by another forward"
            )
        layer = getattr(self, self.last_affine)
        own = layer._parameters  # pruning and parametrizations make weights anew from others at every pass
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        if own.get("weight") is None or (bias is not None and own.get("bias") is None):
            return f"{self.last_affine} ({type(layer).__name__}) has no weights of its own to fold into"
        if not _is_affine(layer):
            return (
                f"{self.last_affine} ({type(layer).__name__}) may do more than scale and shift: by its type, "
                "by a hook or by another forward"
            )
        measured = self.se.measured_gate
        if isinstance(self.se, TAM) and measured.dtype not in (torch.float32, torch.float64):
            return f"its measurement was rounded to {measured.dtype}, which hides movement; measure it again"
        mean, low, high = measured.double().tolist()
        if high == 0.0:
            return "not measured since its weights last changed"
        if not low <= mean <= high:
            return f"measured as {mean:g} between {low:g} and {high:g}; measure it again"
        if not high - low <= tolerance:
            return f"width {high - low:.2g} exceeds the tolerance {tolerance:.2g}"
        if isinstance(self.se, TAM):  # weights that changed in eval mode did not reset the measurement
            now = self.se.gate_at_zero()
            slack = max(tolerance, GATE_TOLERANCE) + torch.finfo(layer.weight.dtype).eps
            if not low - slack <= now <= high + slack:
                return (
                    f"measured as {mean:.6f}, but {now:.6f} for an input of zeros: its weights changed since "
                    "(measure it again), or it is that only on the images measured"
                )
        with torch.no_grad():
            for parameter in (weight, bias):
                if parameter is not None:
                    parameter.mul_(mean)
        self.se = None
        return None


def blocks_of(model: nn.Module) -> dict[str, Any]:
    """The model's residual blocks by name, from the stem to the head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedBlock)}


def _is_affine(layer: nn.Module) -> bool:
    """Whether a factor of weight and bias is one of what the layer gives; a ReLU behind them passes it."""
    if is_plain(layer, BatchNormAct2d):
        return is_plain(layer.act, nn.Identity, nn.ReLU)
    return is_plain(layer, nn.Conv2d, *NORMS, nn.InstanceNorm2d, nn.GroupNorm, GroupNorm, LayerNorm2d)


class BasicBlock(GatedBlock, resnet.BasicBlock):
    """timm's BasicBlock, foldable."""

    last_affine = "bn2"


class Bottleneck(GatedBlock, resnet.Bottleneck):
    """timm's Bottleneck, foldable."""

    last_affine = "bn3"


class ResNet(resnet.ResNet):
    """timm's ResNet with a stem of any width for small or large images, and three or four stages.

    Args:
        stem: "3x3" (stride 1, no max-pool) or "7x7" (stride 2, max-pool).
        stem_width: Channels after the stem.
        kwargs: Those of `timm.models.resnet.ResNet`.
    Raises:
        ValueError: unknown stem.
    """

    def __init__(self, *args: Any, stem: str = "7x7", stem_width: int = 64, **kwargs: Any) -> None:
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if stem == "3x3" and "output_stride" in kwargs:  # timm counts the 7x7 stem's stride of 4
            kwargs["output_stride"] = min(4 * kwargs["output_stride"], 32)
        # of timm's stems only the deep one can be narrower than 64; its convolutions are replaced
        super().__init__(*args, stem_type="deep", stem_width=stem_width // 2, **kwargs)
        made: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        size, stride = (3, 1) if stem == "3x3" else (7, 2)
        self.conv1 = nn.Conv2d(self.in_chans, stem_width, size, stride, size // 2, bias=False, **made)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "3x3":
            self.maxpool = nn.Identity()
            for index, info in enumerate(self.feature_info):
                info["reduction"] = int(info["reduction"]) // (4 if index else 2)
        if not hasattr(self, "layer4"):  # timm's forward names four stages
            self.layer4 = nn.Sequential()
            self.head_last()

    def head_last(self) -> None:
        """Puts pool and classifier behind what was added after them: users count on the order of children."""
        for name in ("global_pool", "fc"):
            self._modules[name] = self._modules.pop(name)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """timm's, of the stages that there are."""
        indices, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, indices, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's, of the stages that there are."""
        indices, last = feature_take_indices(len(self.feature_info), indices)
        if last == len(self.feature_info) - 1:  # nothing to cut, but timm counts four stages
            if prune_head:
                self.reset_classifier(0, "")
            return indices
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> what enters the first block."""
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def forward_tail(self, x: Tensor) -> Tensor:
        """What leaves the last block -> (n, num_classes)."""
        return self.forward_head(x)
