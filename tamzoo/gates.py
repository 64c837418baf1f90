"""TAM's gates on real images: a model and images in, `GateStats` out."""

import re
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from tamzoo.attention import TAM
from tamzoo.backbones import blocks_of
from tamzoo.bounds import bound_gates, gate_bounds
from tamzoo.checkpoint import load_weights, save_weights, whole_file
from tamzoo.progress import Progress, silent
from tamzoo.records import GateStats


def gates_of(model: nn.Module) -> dict[str, TAM]:
    """The model's TAM modules by name, from the stem to the head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TAM)}


def stage_of(name: str) -> int:
    """The stage, 1, 2, ..., in which a module of that name stands; 0 outside the stages."""
    stage = re.search(r"layer(\d+)", name)
    return int(stage[1]) if stage else 0


class _Watch:
    """Running statistics of one gate, in float64; merged batch by batch (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self.images, self.count = 0, 0
        self.mean, self.squares = 0.0, 0.0
        self.low, self.high = float("inf"), float("-inf")
        self.channel_low: Tensor | None = None  # (c,), of the features that the gate looks at
        self.channel_high: Tensor | None = None

    def __call__(self, gate: TAM, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        low, high = x.amin((0, 2, 3)).double(), x.amax((0, 2, 3)).double()
        self.channel_low = low if self.channel_low is None else torch.minimum(self.channel_low, low)
        self.channel_high = high if self.channel_high is None else torch.maximum(self.channel_high, high)
        z = gate.gate(x).double()  # (n, 1, h, w)
        self.images += len(z)
        self.low, self.high = min(self.low, z.min().item()), max(self.high, z.max().item())
        mean, total = z.mean().item(), self.count + z.numel()
        shift = mean - self.mean
        self.squares += (z - mean).square().sum().item() + shift**2 * self.count * z.numel() / total
        self.mean += shift * z.numel() / total
        self.count = total


@torch.inference_mode()
def measure_gates(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    batch_size: int = 128,
    progress: Progress = silent,
    ends: tuple[Tensor, Tensor] | None = None,
) -> list[GateStats]:
    """Every TAM gate of a model over a set of images, each position of each image one value.

    Args:
        images: (n, c, h, w), normalised as the model wants them; or batches of such, so that memory
            does not grow with n.
        batch_size: Images a forward pass, where `images` is one tensor.
        ends: (1, c, h, w) each, the lowest and the highest input that there is, as of `bound_gates`.
    Returns:
        One row a gate, from the stem to the head. The bounds hold for every input whose channels stay
        within the ranges seen here, float32 rounding included (interval arithmetic through the tree);
        those that are proven, where `ends` are given, for every input between these.
    Raises:
        ValueError: training mode, a coarser precision than float32, no gates, fewer than two images, or a
            gate that is not finite.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper gives every gate another name
    if model.training:
        raise ValueError("measuring gates needs a model in eval mode; call model.eval() first")
    gates = gates_of(model)
    if not gates:
        raise ValueError(
            f"{type(model).__name__} has no TAM gates; measure a model named *_tam before folding it"
        )
    place = next(model.parameters())
    if place.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"measuring gates needs a float32 model, got {place.dtype}, whose rounding hides how gates move; "
            "measure model.float(), which may be converted afterwards"
        )
    watches = {name: _Watch() for name in gates}
    hooks = [gates[name].register_forward_pre_hook(watch) for name, watch in watches.items()]
    try:
        pieces = list(images.split(batch_size)) if isinstance(images, Tensor) else images
        # code that is compiled already would pass the hooks by
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(place.device.type, enabled=False):
            for batch in progress(pieces, "Measuring gates"):
                fits = isinstance(batch, Tensor) and batch.is_floating_point() and batch.dim() == 4
                if not fits or not len(batch):
                    raise ValueError(
                        f"expected normalised images (n, c, h, w) in batches, got {_kind(batch)}"
                    )
                model(batch.to(place.device, place.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    blocks = list(blocks_of(model))
    proven = bound_gates(model, *(end.to(place.device) for end in ends)) if ends else {}
    return [
        _stats(
            name,
            blocks.index(parent) + 1 if (parent := name.rpartition(".")[0]) in blocks else index,
            gate,
            watch,
            *proven.get(name, (None, None)),
        )
        for index, ((name, gate), watch) in enumerate(
            zip(gates.items(), watches.values(), strict=True), start=1
        )
    ]


def _kind(batch: object) -> str:
    return f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def _stats(
    name: str, block: int, gate: TAM, watch: _Watch, proven_min: float | None, proven_max: float | None
) -> GateStats:
    if watch.images < 2:
        raise ValueError(f"{watch.images} images cannot show whether a gate is static; pass at least two")
    if not (isfinite(watch.mean) and watch.low <= watch.high):  # min and max pass NaN over
        raise ValueError(f"gate {name} is not finite: the weights or the images hold NaN or infinity")
    assert watch.channel_low is not None and watch.channel_high is not None
    bound_min, bound_max = gate_bounds(gate, watch.channel_low, watch.channel_high)
    return GateStats(
        name=name,
        block=block,
        stage=stage_of(name),
        n=watch.images,
        mean=watch.mean,
        std=(watch.squares / watch.count) ** 0.5,
        min=watch.low,
        max=watch.high,
        bound_min=bound_min,
        bound_max=bound_max,
        proven_min=proven_min,
        proven_max=proven_max,
    )


def save_measured(
    path: Path,
    model: nn.Module,
    name: str,
    images: Callable[[], Iterable[Tensor]],
    progress: Progress = silent,
    ends: tuple[Tensor, Tensor] | None = None,
) -> list[GateStats]:
    """Stores weights in float16 together with the gates as measured on those very weights.

    The model holds afterwards what the file holds.

    Args:
        images: Gives batches as for `measure_gates`; called where there are gates.
        ends: As of `measure_gates`.
    Raises:
        ValueError: as `measure_gates` and `save_weights`; nothing is left behind then.
    """
    with whole_file(path) as part:
        save_weights(part, model.state_dict())
        load_weights(model, part, name)
        gates = measure_gates(model, images(), progress=progress, ends=ends) if gates_of(model) else []
        remember_gates(model, gates)
        save_weights(part, model.state_dict())
    return gates


@torch.no_grad()
def remember_gates(model: nn.Module, gates: Iterable[GateStats]) -> None:
    """Stores measured gates in the model, in place: they travel with its state dict and fold without data.

    Raises:
        ValueError: a gate that the model does not have.
    """
    modules = gates_of(getattr(model, "_orig_mod", model))
    for stats in gates:
        if stats.name not in modules:
            raise ValueError(f"the model has no gate {stats.name!r}; it has {', '.join(modules) or 'none'}")
        gate = modules[stats.name]
        # a loader that sets tensors one by one, as transformers' does, may have put 16 bits there
        gate.measured_gate = gate.measured_gate.float()
        gate.measured_gate.copy_(gate.measured_gate.new_tensor([stats.mean, stats.min, stats.max]))
