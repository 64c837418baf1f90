from copy import deepcopy
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn

from tamzoo import block_end, tree_cpu
from tamzoo.attention import TAM
from tamzoo.backbones import BasicBlock, Bottleneck
from tamzoo.block_end import join_ends
from tamzoo.journal import read_log
from tests.tiny_runs import RECIPE, tiny_run

needs_compiler = pytest.mark.skipif(tree_cpu.library() is None, reason="no C++ compiler")


def stage(kind: type[BasicBlock | Bottleneck], planes: int = 8, **options) -> nn.Sequential:
    """Two blocks, the first of which changes the width, with parameters that differ between channels."""
    torch.manual_seed(0)
    width, options = planes * kind.expansion, {"attn_layer": TAM} | options
    downsample = nn.Sequential(nn.Conv2d(4, width, 1, bias=False), nn.BatchNorm2d(width))
    first, second = kind(4, planes, downsample=downsample, **options), kind(width, planes, **options)
    blocks = nn.Sequential(first, second).to(memory_format=torch.channels_last)
    for block in blocks:
        if isinstance(block.se, TAM):
            block.se.measured_gate.fill_(0.5)  # to be forgotten in training
    for parameter in blocks.parameters():
        if parameter.dim() < 2 or parameter.shape[1:] == (2, 1, 1):  # not the blocks' convolutions
            nn.init.normal_(parameter, std=0.7)
    return blocks


def noise(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).contiguous(memory_format=torch.channels_last)


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_joined_blocks_train_as_timms_do(kind, compiled):
    blocks = stage(kind).double()
    joined = deepcopy(blocks)
    assert join_ends(joined) == 2 and joined.state_dict().keys() == blocks.state_dict().keys()
    call = torch.compile(joined, backend="aot_eager", fullgraph=True) if compiled else joined
    x, weights = noise(3, 4, 5, 7).double(), noise(3, 8 * kind.expansion, 5, 7, seed=2).double()
    outs = []
    for each in (blocks, call):
        outs.append(each(x))
        (outs[-1] * weights).sum().backward()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-9)
    for (name, wanted), found in zip(blocks.named_parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, wanted), found in zip(blocks.named_buffers(), joined.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)
    assert not any(block.se.measured_gate.any() for block in joined)
    torch.testing.assert_close(joined.eval()(x), blocks.eval()(x), rtol=1e-9, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("name", ["aa", "drop_block"])
def test_joined_blocks_keep_what_timm_puts_between_their_layers(kind, name):
    blocks, x = stage(kind), noise(2, 4, 5, 7)
    for block in blocks:
        setattr(block, name, nn.Sigmoid())
    joined = deepcopy(blocks)
    assert join_ends(joined) == 2
    torch.testing.assert_close(joined(x), blocks(x))


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_a_joined_block_keeps_nothing_for_the_gate(compiled):
    """What the backward pass keeps: of a plain block, and of that and the tree's small parameters."""

    def kept(blocks: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, model = noise(4, 4, 16, 16), nn.Sequential(blocks, nn.Conv2d(32, 2, 1))  # it keeps its input
        call = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
        with torch.autocast("cpu", torch.bfloat16, enabled=compiled):
            call(x)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                call(x)
        return sum(sizes.values())

    joined = stage(Bottleneck)
    assert join_ends(joined) == 2
    assert kept(joined) <= kept(stage(Bottleneck, attn_layer=None)) + 32 * 32 * 4


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck's own copies
def test_operators_keep_torchs_rules():
    x, shortcut = noise(2, 8, 3, 3).requires_grad_(), noise(2, 8, 3, 3, seed=2).requires_grad_()
    *parts, parameters = (torch.rand(n, requires_grad=True) for n in (8, 8, 8, 8, 27))
    torch.library.opcheck(block_end.block_end, (x, *parts, shortcut, parameters))


@needs_compiler
def test_numbers_that_are_not_finite_stay_so():
    blocks = stage(BasicBlock)
    join_ends(blocks)
    assert blocks(noise(2, 4, 3, 3).fill_(float("nan"))).isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"attn_layer": None},
        {"attn_layer": "se"},
        {"attn_layer": lambda channels, **made: TAM(channels, group_size=4, **made)},
        {"planes": 6},
        {"drop_path": nn.Dropout(0.1)},
        {"act_layer": nn.LeakyReLU},
        {"norm_layer": lambda *args, **made: nn.BatchNorm2d(*args, momentum=None, **made)},
        {"norm_layer": lambda *args, **made: nn.BatchNorm2d(*args, affine=False, **made)},
        {"norm_layer": lambda *args, **made: nn.BatchNorm2d(*args, track_running_stats=False, **made)},
        {"norm_layer": nn.SyncBatchNorm},
    ],
)
def test_other_blocks_are_left_alone(options):
    blocks = stage(Bottleneck, **options)
    assert join_ends(blocks) == 0 and type(blocks[0]) is Bottleneck


@needs_compiler
def test_gradients_in_bfloat16_are_near_those_of_blocks_that_are_not_joined():
    blocks = stage(BasicBlock)
    joined, grads = deepcopy(blocks), []
    assert join_ends(joined) == 2
    for each in (blocks, joined):
        x = noise(4, 4, 16, 16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            each(x).square().mean().backward()
        grads.append([x.grad, *(parameter.grad for parameter in each.parameters())])
    for wanted, found in zip(*grads, strict=True):
        assert (found - wanted).norm() <= 0.1 * wanted.norm() + 1e-4


@needs_compiler
def test_a_joined_block_leaves_a_frozen_batchnorm_frozen():
    blocks, x = stage(BasicBlock), noise(4, 4, 5, 7)
    for module in blocks.modules():
        module.train(not isinstance(module, nn.BatchNorm2d))
    joined = deepcopy(blocks)
    assert join_ends(joined) == 2
    torch.testing.assert_close(joined(x), blocks(x))
    assert all(
        module.num_batches_tracked == 0 for module in joined.modules() if isinstance(module, nn.BatchNorm2d)
    )


@needs_compiler
def test_a_joined_block_that_was_folded_trains_without_its_gate():
    joined = stage(BasicBlock)
    assert join_ends(joined) == 2
    joined.eval()(noise(2, 4, 5, 7))
    for block in joined:
        block.se = None
    joined.train()(noise(2, 4, 5, 7)).sum().backward()


def test_blocks_with_hooks_are_left_alone():
    for name in ("bn2", "se", "se.tree.0", "act2"):
        blocks = stage(BasicBlock)
        blocks[0].get_submodule(name).register_forward_hook(lambda *given: None)
        assert join_ends(blocks) == 1


def test_models_of_other_makes_are_left_alone():
    assert join_ends(nn.Sequential(TimmBottleneck(32, 8))) == 0
    assert join_ends(timm.create_model("wrn10_4_tam")) == 0


@needs_compiler
def test_a_run_with_joined_ends_learns(tmp_path):
    recipe = replace(RECIPE, epochs=1)
    runs = [tiny_run(tmp_path / str(joined), recipe=recipe, joined=joined) for joined in (False, True)]
    for run in runs:
        run.train()
    assert type(runs[1].learner.model.get_submodule("layer1.0")) is block_end.JoinedBasicBlock
    wanted, found = (read_log(run.out)[0]["train_loss"] for run in runs)
    assert found == pytest.approx(wanted, rel=1e-3)  # rounding turns ReLUs, on 8 images by more than itself
