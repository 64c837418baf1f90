"""The wide ResNet: timm's ResNet of pre-activation blocks, with an attention in every residual branch."""

from typing import Any

from timm.layers import get_act_layer, get_norm_layer
from timm.models import resnet
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tamzoo.backbones import GatedBlock, ResNet


class PreActBlock(GatedBlock, resnet.BasicBlock):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3-attention, plus the input; 1x1 conv + BN where the width changes.

    Args:
        args, kwargs: Those of timm's BasicBlock, whose layers these are in another order.
    """

    last_affine = "conv2"

    def __init__(
        self, inplanes: int, planes: int, *args: Any, norm_layer: Any = nn.BatchNorm2d, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, planes, *args, norm_layer=norm_layer, **kwargs)
        made: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.bn1 = norm_layer(inplanes, **made)
        self.bn2 = norm_layer(self.conv1.out_channels, **made)

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.act1(self.bn1(x)))
        x = self.conv2(self.aa(self.act2(self.drop_block(self.bn2(x)))))  # pyright: ignore[reportOptionalCall]
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x + shortcut


class WideResNet(ResNet):
    """Wide ResNet (Zagoruyko & Komodakis, 2016) in the form that the paper's parameter counts give.

    Stem convolution + BN + ReLU; stages of pre-activation blocks; BN + ReLU before the pool.
    (n, c, h, w) -> (n, num_classes). Arguments and errors as of `ResNet`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        made: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        norm_layer: Any = get_norm_layer(kwargs.get("norm_layer", nn.BatchNorm2d))
        act_layer: Any = get_act_layer(kwargs.get("act_layer", nn.ReLU))
        self.bn2, self.act2 = norm_layer(self.num_features, **made), act_layer(inplace=True)
        self.head_last()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's; the BatchNorm before the pool goes with the last block."""
        matcher: dict[str, Any] = super().group_matcher(coarse)
        return matcher | {"blocks": [(matcher["blocks"], None), (r"^bn2\.", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, num_features, h / reduction, w / reduction)."""
        return self.act2(self.bn2(super().forward_features(x)))

    def forward_tail(self, x: Tensor) -> Tensor:
        """What leaves the last block -> (n, num_classes)."""
        return super().forward_tail(self.act2(self.bn2(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's; `norm` has the BN + ReLU before the pool applied to the last stage's features."""
        x, found = super().forward_intermediates(x, indices, norm, stop_early, output_fmt)
        stages = len(self.feature_info)
        reached = feature_take_indices(stages, indices)[1] == stages - 1
        if (norm and reached) or not (intermediates_only or (stop_early and not reached)):
            x = self.act2(self.bn2(x))
        if norm and reached:
            found[-1] = x
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's; the BN + ReLU before the pool go where the last stage does, or by `prune_norm`."""
        stages = len(self.feature_info)
        if prune_norm or feature_take_indices(stages, indices)[1] < stages - 1:
            self.bn2, self.act2 = nn.Identity(), nn.Identity()
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)
