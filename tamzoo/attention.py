"""The paper's three attention modules, and a scalar beside them: (n, c, h, w) to the same shape."""

from functools import partial
from typing import Any

import torch
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from timm.models import register_notrace_module
from torch import Tensor, nn

from tamzoo.tree import climb, gated

GATE_TOLERANCE = 1e-4  # largest width (maximum - minimum) of a measured gate that counts as static


class TAM(nn.Module):
    """Tree-structured Attention Module (paper, section 2, Eq. 1-2).

    A tree of 1x1 group convolutions, each looking at `group_size` neighbouring channels, with
    channel-wise PReLUs between them, reduces c channels to one; its sigmoid scales every channel.
    Where the channel count stops being divisible by the group size, one dense 1x1 convolution
    finishes the tree.

    The buffer `measured_gate` holds mean, minimum and maximum of the gate as last measured by
    `tamzoo.measure_gates`, zeros where nobody has; it travels with the state dict, stays float32 in a model
    of any dtype, and is reset by a forward pass in training mode and by weights that come without it or that
    hold it in 16 bits.

    A gradient can be differentiated again (`create_graph=True`) where x is not channels_last, and by
    `torch.func` in any memory format.

    Args:
        channels: c >= 1.
        group_size: g >= 2, the number of channels that one node of the tree sees.
    Raises:
        ValueError: channels < 1, group_size < 2, or either is not an integer.
    """

    measured_gate: Tensor

    def __init__(self, channels: int, group_size: int = 2, *, device=None, dtype=None) -> None:
        super().__init__()
        _check_integer("channels", channels, least=1)
        _check_integer("group_size", group_size, least=2)
        self.channels, self.group_size = channels, group_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        width = channels
        while width > 1 and width % group_size == 0:
            width //= group_size
            layers.append(nn.Conv2d(width * group_size, width, 1, groups=width, **made))
            if width > 1:
                layers.append(nn.PReLU(width, init=0.0, **made))
        if width > 1 or not layers:
            layers.append(nn.Conv2d(width, 1, 1, **made))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.tree = nn.Sequential(*layers)
        self.register_buffer("measured_gate", torch.zeros(3, device=device))

    def gate(self, x: Tensor) -> Tensor:
        """The gate Z of Eq. 2: (n, c, h, w) -> (n, 1, h, w), in (0, 1)."""
        return torch.sigmoid(climb(x, self.tree))

    @torch.no_grad()
    def gate_at_zero(self) -> float:
        """The gate of a position whose channels are all zero: where it is static, the gate of any."""
        weight = next(self.tree.parameters())
        return float(self.gate(weight.new_zeros(1, self.channels, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        # the weights, or the statistics before them, are about to move; a trace of torch.fx moves nothing
        if self.training and not isinstance(x, torch.fx.Proxy):
            self.forget_gate()
        return gated(x, self.tree)

    def forget_gate(self) -> None:
        """Marks the gate as not measured."""
        if torch.compiler.is_compiling():  # which cannot read the other
            self.measured_gate.zero_()
        else:
            with torch._C._DisableFuncTorch():  # it would refuse: the buffer is none of the function's inputs
                self.measured_gate.zero_()

    def _apply(self, fn, recurse: bool = True):
        gate = self.measured_gate
        super()._apply(fn, recurse)
        if self.measured_gate.dtype != gate.dtype:  # rounded, minimum and maximum may fall together
            self.measured_gate = gate.to(self.measured_gate.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # weights that know nothing of gates, or of which 16 bits were kept, leave the gate unmeasured
        found = state_dict.get(name := f"{prefix}measured_gate")
        ours = any(key.startswith(prefix) for key in state_dict)  # other layers' weights change no gate
        if ours and (found is None or found.dtype not in (torch.float32, torch.float64)):
            state_dict[name] = torch.zeros(3)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.channels}, group_size={self.group_size}"


register_notrace_module(TAM)  # timm's feature extraction by torch.fx takes it whole


class Scalar(nn.Module):
    """One learned gate for all channels, positions and images: what TAM comes to where its gates are static.

    (n, c, h, w) -> the same, times sigmoid(logit). Not in the paper: it asks whether the tree matters.
    """

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    @property
    def measured_gate(self) -> Tensor:
        """Mean, minimum and maximum, as TAM has them: one number, which nobody need measure."""
        return torch.sigmoid(self.logit.detach()).expand(3)

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.sigmoid(self.logit)).to(x.dtype)  # autocast makes it float32


def _check_integer(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


# SE and CBAM are timm's, in the paper's configuration: reduction 16; SE's two linear layers without
# bias, CBAM's with; CBAM's 7x7 spatial convolution without bias, followed by a BatchNorm.
SE = partial(SEModule, rd_ratio=1 / 16, rd_divisor=1, bias=False)
CBAM = partial(CbamModule, rd_ratio=1 / 16, rd_divisor=1, mlp_bias=True)

ATTENTIONS = {"plain": None, "se": SE, "cbam": CBAM, "tam": TAM, "scalar": Scalar}
