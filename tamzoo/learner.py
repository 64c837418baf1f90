"""One training step: forward, loss, backward, SGD, average, on the device and without waiting for it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tamzoo.augment import augment, draw, shrink
from tamzoo.backbones import blocks_of
from tamzoo.block_end import join_ends
from tamzoo.cache import program_folder
from tamzoo.catalogue import Entry
from tamzoo.checkpoint import load_weights
from tamzoo.data import Split
from tamzoo.distributed import World
from tamzoo.gates import gates_of
from tamzoo.recipes import Recipe
from tamzoo.replay import Replayed

Compiled = Literal["no", "model", "blocks"]  # by torch.compile, as one graph or as a graph a kind of block
MOST_GRAPHS = 64  # of blocks that share their code: kinds of block times sizes of image
MOST_SEED = 2**31 - 1  # `seed_of` makes 64-bit numbers of it
logger = logging.getLogger(__name__)
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class Learner:
    """A model and all that changes while it learns.

    Attributes:
        model: Being trained.
        kept: What will be stored: the model, or the average of its weights and BatchNorm statistics.

    Args:
        precision: "float32", or "bfloat16" for autocast.
        compiled: What torch.compile makes of the forward pass: nothing, one graph, or one for each kind of
            block, which compiles sooner the deeper the model is, since the blocks of a stage are alike.
        world: The processes that train together.
        model_args: Of the model, beyond the entry's own.
        start: Weights to begin with, in place of random ones.
        start_head: Whether those of the classifier too; they mean nothing for other classes.
        cuda_graph: Whether whole batches replay a captured step; of one process on CUDA.
        joined: Whether blocks train with their ends as one operation, where they can; of one process.
    Raises:
        ValueError: no such precision or seed; or `start` is not of this model.
    """

    def __init__(
        self,
        entry: Entry,
        recipe: Recipe,
        *,
        seed: int,
        precision: str,
        compiled: Compiled,
        world: World,
        model_args: dict[str, Any] | None = None,
        start: Path | None = None,
        start_head: bool = True,
        cuda_graph: bool = False,
        joined: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"seed must be from 0 to {MOST_SEED}, got {seed}")
        self.recipe, self.dataset, self.seed, self.world = recipe, entry.dataset, seed, world
        self._dtype = PRECISIONS[precision]
        torch.manual_seed(seed)
        self.model = timm.create_model(entry.name, **(model_args or {})).to(world.device)
        if start:
            load_weights(self.model, start, entry.name, head=start_head)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for gate in gates_of(self.model).values():
            for parameter in gate.parameters():  # the strides of their gradients, as DDP wants them
                parameter.data = parameter.data.flatten().view(parameter.shape)
        if joined and not join_ends(self.model):
            logger.warning("no block of %s has an end that can be joined; it trains as it is", entry.name)
        self.kept = deepcopy(self.model).requires_grad_(False) if recipe.ema_decay else self.model
        self._compiled = compiled
        self._forward = self._full_forward = world.spread(self.model)
        if compiled != "no":
            torch.compiler.reset()  # it gives up at the ninth model of one class
            if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(program_folder("inductor"))
        if compiled == "model":
            torch._dynamo.config.recompile_limit = MOST_GRAPHS  # SyncBatchNorm breaks it into many
            self._full_forward = torch.compile(self._forward, dynamic=False)
        if compiled == "blocks":
            compile_blocks(self.model)
        set_cudnn()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        for parameter in self.model.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        pairs = zip(self.kept.state_dict().values(), self.model.state_dict().values(), strict=True)
        floats = [pair for pair in pairs if recipe.ema_decay and pair[0].is_floating_point()]
        self._averages, self._averaged = [pair[0] for pair in floats], [pair[1] for pair in floats]
        self._replayed: dict[torch.Size, Replayed] | None = {} if cuda_graph else None  # by the images' shape
        if cuda_graph:  # a number would be captured
            self.optimizer.param_groups[0]["lr"] = torch.zeros((), device=world.device)
        self._generator = torch.Generator(world.device)

    def state(self) -> dict[str, Tensor]:
        """The live tensors that a step changes, by name."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.kept is not self.model:
            state |= {f"ema.{name}": value for name, value in self.kept.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        return state

    @contextmanager
    def passing(self, compiled: bool = False) -> Iterator[None]:
        """The context of a forward pass: its precision, and blocks that run as they are unless `compiled`."""
        as_they_are = self._compiled == "blocks" and not compiled
        stance = torch.compiler.set_stance("force_eager") if as_they_are else nullcontext()
        with stance, torch.autocast(self.world.device.type, self._dtype, enabled=self._dtype is not None):
            yield

    def learn(self, split: Split, chosen: Tensor, step: int, fraction: float) -> Tensor:
        """One step on the images of a split at the indices `chosen`: on this rank's share of them.

        Args:
            chosen: (n,) int64, the whole batch, the same on all ranks.
            step: Of the whole run; what is random depends on it and the seed alone.
            fraction: Of the training that is done, for the recipe's learning rate and image size.
        Returns:
            Mean loss of this rank's share, on the device, without its graph; the next step may overwrite it.
        """
        recipe, n = self.recipe, len(chosen)
        mine = self.world.share(chosen)
        self._generator.manual_seed(seed_of(self.seed, step, salt=2))
        draws = self.world.share(draw(n, recipe, self.dataset, self._generator))
        x = shrink(augment(split.pixels[mine], draws, recipe, self.dataset), recipe, fraction)
        whole, group = n == recipe.batch_size, self.optimizer.param_groups[0]
        # The last batch of an epoch may be smaller; it runs as it is rather than be compiled too.
        update = partial(self._update, whole, len(mine) * self.world.size / n)
        if self._replayed is None:
            group["lr"] = recipe.lr_at(fraction)
        else:
            group["lr"].fill_(recipe.lr_at(fraction))
            if whole:
                update = partial(self._replayed.setdefault(x.shape, Replayed()), update)
        loss = update(x, split.labels[mine])
        if self._averages:
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))  # the first weights are soon forgotten
            torch._foreach_lerp_(self._averages, self._averaged, 1 - decay)
        return loss

    def _update(self, compiled: bool, weight: float, x: Tensor, labels: Tensor) -> Tensor:
        """The step on prepared images; the mean loss.

        Args:
            weight: Of this rank's gradients: the ranks' are averaged.
        """
        with self.passing(compiled):
            logits = (self._full_forward if compiled else self._forward)(x)
        logits = logits if self._dtype is None else logits.float()
        loss = cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        (loss * weight).backward()
        self.optimizer.step()
        return loss.detach()


def compile_blocks(model: nn.Module) -> None:
    """Has torch.compile make each residual block's pass, in place; blocks of one kind share a graph."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks_of(model).values():
        block.compile(dynamic=False)


def set_cudnn() -> None:
    """Fastest algorithms, and float32 that is float32: cuDNN would round its inputs to TF32, cuBLAS may."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False  # as NVIDIA's containers set it


def seed_of(seed: int, index: int, salt: int) -> int:
    """A generator seed for each (seed, index, salt); far apart, so that neighbours share no stream."""
    return (seed * 1_000_003 + index) * 10 + salt
