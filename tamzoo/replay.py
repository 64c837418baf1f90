"""A training step as one CUDA graph, where the GPU would wait for Python to launch its kernels one by one."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # calls that run as they are: they compile, let cuDNN search and fill the allocator's cache


class Replayed:
    """One function of CUDA tensors of always the same shapes: called a few times, captured, then replayed.

    A replay changes in place what the function changed in place when it was captured; what Python computed
    then, a number handed to a kernel say, stays as it was. So all that varies must be in tensors.
    """

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Its result, which the next call overwrites.

        Args:
            function: Waits for nothing on the device. It is not kept: its owner may own this.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            return _aside(function, inputs)
        if self._calls == WARM_UP + 1:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._replay, self._output = capture(function, self._inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._replay()
        return self._output


def _aside(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """On another stream than the default one, which a capture would have to wait for."""
    here, aside = torch.cuda.current_stream(), _side_stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        output = function(*inputs)
    here.wait_stream(aside)
    return output


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one: each has memory of its own


def capture(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records what `function(*inputs)` launches; returns what launches it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return graph.replay, output
