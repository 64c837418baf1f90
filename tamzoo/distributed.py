"""One training run on several processes, started by torchrun: the numbers are those of one process.

Each rank holds the whole training split, draws order and augmentation of the whole batch, and trains on its
share of it. Gradients are those of the mean over the whole batch, and BatchNorm's statistics are the whole
batch's too: torch's SyncBatchNorm on CUDA, `GlobalBatchNorm` on CPUs, where torch has none. The first rank
alone reads snapshots, writes, evaluates and tells.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows of a batch; where they do not divide, the first ranks take one more."""
        return rows.tensor_split(self.size)[self.rank]

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with the first rank's."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            with torch.no_grad():
                tensor.copy_(sent)

    def first_says(self, flag: bool) -> bool:
        """The first rank's flag. Waits for the device where there are several ranks."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag), device=self.device)
        dist.broadcast(said, src=0)
        return bool(said.item())

    def spread(self, model: nn.Module) -> nn.Module:
        """The model with synchronised gradients and BatchNorm; the model itself in a world of one."""
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return DistributedDataParallel(model, device_ids=[self.device], gradient_as_bucket_view=True)
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun describes in the environment, a world of one without it.

    Raises:
        ValueError: an environment that torchrun did not make; more ranks on this machine than CUDA devices.
    """
    cuda = torch.cuda.is_available()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World(device=torch.device("cuda" if cuda else "cpu"))
        return
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    if wrong := [name for name, value in told.items() if not value.isdecimal()]:
        raise ValueError(
            f"WORLD_SIZE is {told['WORLD_SIZE']!r}, but {wrong[0]} is {told[wrong[0]]!r}, not a number; "
            "start several processes with torchrun, or unset WORLD_SIZE"
        )
    local = int(told["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "pass torchrun --nproc-per-node that many"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


class _Sum(Function):
    """Sum over all ranks; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in training normalises by the statistics of all ranks' images."""

    @torch.compiler.disable  # torch 2.11 drops the sums from a compiled backward pass
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        n, _, h, w = input.shape
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = _Sum.apply(x.new_tensor([float(n * h * w)]))
        mean = _Sum.apply(x.sum((0, 2, 3))) / count
        centred = x - mean.view(-1, 1, 1)
        var = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)
