"""Several processes train as one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tamzoo.distributed import GlobalBatchNorm, World, join
from tamzoo.journal import read_log
from tamzoo.records import read_record
from tamzoo.snapshots import load_snapshot
from tests.tiny_runs import RECIPE, tiny_run

CPU = torch.device("cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    script = Path(__file__).with_name("rank_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path), "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "strides" not in done.stderr, done.stdout + done.stderr
    one, several = (load_snapshot(tmp_path / name) for name in ("one", "several"))
    assert one and several and one[1]["step"] == several[1]["step"] == "9"
    for name, value in one[0].items():
        if name != "losses":  # those are of the first process's share
            # Sums of the same float64 numbers in another order, over nine steps. (In float32 a ReLU that
            # tips the other way makes 4e-4 of one rounding by the second step.)
            torch.testing.assert_close(several[0][name], value, atol=1e-12, rtol=1e-12, msg=name)
    start = tiny_run(tmp_path / "start").learner.model.get_parameter("conv1.weight")
    assert (one[0]["model.conv1.weight"] - start).abs().max() > 1e-3  # it did learn
    assert [row["epoch"] for row in read_log(tmp_path / "several")] == [1, 2, 3]
    assert read_record(tmp_path / "several" / "record.json").hardware.startswith("2 x CPU")


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_norm_of_all_ranks_is_that_of_torch(group_of_one, dtype, tolerance):
    torch.manual_seed(0)
    x, grad = (torch.randn(4, 3, 5, 5).to(dtype) for _ in range(2))
    found, expected = GlobalBatchNorm(3), nn.BatchNorm2d(3)
    ins = [x.clone().requires_grad_() for _ in range(2)]
    outs = [norm(leaf) for norm, leaf in zip((found, expected), ins, strict=True)]
    torch.autograd.backward(outs, [grad, grad])
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ins[0].grad, ins[1].grad, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.weight.grad, expected.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.eval()(x), expected.eval()(x), atol=tolerance, rtol=tolerance)


def test_batch_norm_of_all_ranks_is_not_compiled(group_of_one):
    counter = CompileCounterWithBackend("aot_eager")  # torch 2.11 would lose gradients
    norm, grads = GlobalBatchNorm(3), []
    x, grad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    for call in (norm, torch.compile(norm, backend=counter)):
        leaf = x.clone().requires_grad_()
        call(leaf).backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(*grads) and not counter.frame_count


@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 2), (128, 3), (80, 7), (5, 5)])
def test_shares_are_nearly_equal_and_all_of_a_batch(n, size):
    worlds = [World(device=CPU, rank=rank, size=size) for rank in range(size)]
    shares = [world.share(torch.arange(n)).tolist() for world in worlds]
    assert [index for share in shares for index in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_too_small_for_its_ranks_is_told(tmp_path):
    world = World(device=CPU, size=5)
    with pytest.raises(ValueError, match="the last batch of an epoch has 4 images, too few for 5 processes"):
        tiny_run(tmp_path, recipe=RECIPE, world=world)


def test_without_torchrun_the_world_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as world:
        assert (world.size, world.rank, world.first) == (1, 0, True)
        model = nn.Sequential(nn.BatchNorm2d(3))
        assert world.spread(model) is model and type(model[0]) is nn.BatchNorm2d
