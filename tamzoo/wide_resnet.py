"""The wide ResNet, of pre-activation blocks, with an attention in every residual branch."""

from typing import Any

from timm.layers import (
    DropPath,
    create_attn,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tamzoo.backbones import GatedBlock, stem_conv


class PreActBlock(GatedBlock, nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3-attention, plus the input; 1x1 conv + BN where the width changes."""

    last_affine = "conv2"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        attn_layer: Any = None,
        drop_path: float = 0.0,
        **made: Any,
    ) -> None:
        super().__init__()
        self.bn1 = norm_layer(inplanes, **made)
        self.act1 = act_layer(inplace=True)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False, **made)
        self.bn2 = norm_layer(planes, **made)
        self.act2 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False, **made)
        self.se = create_attn(attn_layer, planes, **made)
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False, **made),
                norm_layer(planes, **made),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.act1(self.bn1(x)))
        x = self.conv2(self.act2(self.bn2(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x + shortcut


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko & Komodakis, 2016) in the form that the paper's parameter counts give.

    Stem convolution + BN + ReLU; three stages of pre-activation blocks; BN + ReLU before the pool.
    (n, c, h, w) -> (n, num_classes).

    Args:
        layers: Blocks a stage.
        channels: Channels a stage.
        stem: "3x3" (stride 1, no max-pool) or "7x7" (stride 2, max-pool).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0.
        block_args: `attn_layer`, as for timm's ResNet.
    Raises:
        ValueError: unknown stem.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem: str = "7x7",
        stem_width: int = 16,
        channels: tuple[int, ...] = (160, 320, 640),
        act_layer: Any = nn.ReLU,
        norm_layer: Any = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block_args: dict[str, Any] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False

        self.conv1 = stem_conv(stem, in_chans, stem_width, **made)
        self.bn1 = norm_layer(stem_width, **made)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.Identity() if stem == "3x3" else nn.MaxPool2d(3, stride=2, padding=1)

        reduction = 1 if stem == "3x3" else 2
        self.feature_info = [{"num_chs": stem_width, "reduction": reduction, "module": "act1"}]
        reduction *= reduction  # the 7x7 stem's max-pool halves once more: 1 stays 1, 2 becomes 4
        inplanes, index, last = stem_width, 0, max(sum(layers) - 1, 1)
        self.stage_names = tuple(f"layer{stage}" for stage in range(1, len(layers) + 1))
        for name, blocks, planes in zip(self.stage_names, layers, channels, strict=True):
            stage = nn.Sequential()
            stride = 1 if name == "layer1" else 2
            reduction *= stride
            for _ in range(blocks):
                stage.append(
                    PreActBlock(
                        inplanes,
                        planes,
                        stride,
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        drop_path=drop_path_rate * index / last,
                        **(block_args or {}),
                        **made,
                    )
                )
                inplanes, stride, index = planes, 1, index + 1
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": planes, "reduction": reduction, "module": name})

        self.bn2 = norm_layer(inplanes, **made)
        self.act2 = act_layer(inplace=True)
        self.num_features = inplanes
        self._make_head(num_classes, global_pool, **made)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": [(blocks, None), (r"^bn2\.", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(num_classes, pool, **get_device_dtype(self))

    def _make_head(self, num_classes: int, pool: Any, **made: Any) -> None:
        self.num_classes = num_classes
        head: tuple[Any, ...] = create_classifier(self.num_features, num_classes, pool_type=pool, **made)
        self.global_pool, self.fc = head
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's forward_intermediates: the stem's output is index 0, each stage's the next."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stage_names) + 1, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        found = [x] if 0 in wanted else []
        x = self.maxpool(x)
        for index, name in enumerate(self.stage_names, start=1):
            if stop_early and index > last:
                break
            x = self._stage(name, x)
            if index in wanted:
                found.append(x)
        whole = not stop_early or last == len(self.stage_names)
        final = norm and len(self.stage_names) in wanted
        if final or (whole and not intermediates_only):
            x = self.act2(self.bn2(x))
        if final:
            found[-1] = x
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's prune_intermediate_layers: what comes after the last feature that is wanted goes."""
        wanted, last = feature_take_indices(len(self.stage_names) + 1, indices)
        for name in self.stage_names[last:]:
            setattr(self, name, nn.Sequential())
        if prune_norm:
            self.bn2, self.act2 = nn.Identity(), nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        if self.grad_checkpointing:
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> what enters the first block."""
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def forward_tail(self, x: Tensor) -> Tensor:
        """What leaves the last block -> (n, num_classes)."""
        return self.forward_head(self.act2(self.bn2(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, num_features, h / reduction, w / reduction)."""
        x = self.forward_stem(x)
        for name in self.stage_names:
            x = self._stage(name, x)
        return self.act2(self.bn2(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
