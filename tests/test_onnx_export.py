import math
from dataclasses import replace

import onnx
import pytest
import timm
import torch

import tamzoo
from tamzoo.data import normalise
from tamzoo.datasets import DATASETS
from tamzoo.deploy import FLOAT16, Deployment, check_parity
from tamzoo.images import random_crops
from tamzoo.onnx_export import export_deployment, metadata_of, open_session, operators_of, runner

CIFAR10 = DATASETS["cifar10"]
PIXELS = random_crops(256, 32)


@pytest.fixture
def static(shaken):
    """Builds a TAM model with static gates, and folds a copy."""

    def build(backbone):
        model = shaken(timm.create_model(f"{backbone}_tam.cifar10"))
        for index, gate in enumerate(module for module in model.modules() if isinstance(module, tamzoo.TAM)):
            gate.tree[-1].weight.data.zero_()
            gate.tree[-1].bias.data.fill_(0.1 * index)
        gates = tamzoo.measure_gates(model, normalise(PIXELS[:8], CIFAR10))
        return model, tamzoo.reparameterize_model(model, gates)

    return build


def export(deployed, path, reference, uint8=False, **changes):
    made = Deployment(
        name="test",
        model=deployed,
        reference=reference,
        dataset=CIFAR10,
        pixels=PIXELS,
        report=None,
        told={"entry": "test"},
    )
    return export_deployment(replace(made, **changes), path, uint8=uint8)


@pytest.mark.parametrize("backbone", ["resnet20", "wrn10_4"])
def test_a_folded_file_agrees_with_the_unfolded_model_and_has_the_plain_operators(backbone, static, tmp_path):
    model, folded = static(backbone)
    parity = export(folded, tmp_path / "folded.onnx", model, told={"entry": "test", "gates": {"a": 0.5}})
    assert parity.n == 256 and parity.same_top1 == 256 and parity.max_difference <= 1e-3
    plain = timm.create_model(f"{backbone}_plain.cifar10").eval()
    export(plain, tmp_path / "plain.onnx", plain)
    operators = operators_of(tmp_path / "folded.onnx")
    assert operators == operators_of(tmp_path / "plain.onnx")
    assert not {"Sigmoid", "PRelu"} & set(operators)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded.onnx", "plain.onnx"], (
        "no .data beside them"
    )

    file = onnx.load(tmp_path / "folded.onnx")
    assert file.opset_import[0].version >= 18
    assert [value.name for value in (*file.graph.input, *file.graph.output)] == ["pixel_values", "logits"]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch size is free"
    session = open_session(tmp_path / "folded.onnx")
    for n in (1, 3):
        assert session.run(None, {"pixel_values": normalise(PIXELS[:n], CIFAR10).numpy()})[0].shape == (n, 10)
    told = metadata_of(session)
    assert told["entry"] == "test" and told["gates"] == {"a": 0.5} and told["gates_left"] == []
    assert tuple(told["labels"]) == CIFAR10.class_names and tuple(told["std"]) == CIFAR10.std
    assert told["input_size"] == [3, 32, 32]


def test_bytes_in_give_the_same_answers_and_gates_may_stay(static, tmp_path):
    model, _ = static("resnet20")
    path = tmp_path / "bytes.onnx"
    export(model, path, model, uint8=True)
    session = open_session(path)
    assert "Sigmoid" in operators_of(path) and len(metadata_of(session)["gates_left"]) == 9
    (found,) = session.run(None, {"pixel_values": PIXELS[:4].permute(0, 2, 3, 1).contiguous().numpy()})
    with torch.no_grad():
        expected = model(normalise(PIXELS[:4], CIFAR10))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def test_a_file_that_disagrees_is_not_written(static, tmp_path):
    model, folded = static("resnet20")
    with torch.no_grad():
        folded.layer3[2].bn2.bias.add_(0.05)
    with pytest.raises(ValueError, match="is not written, the export disagrees with the model"):
        export(folded, tmp_path / "wrong.onnx", model)
    assert list(tmp_path.iterdir()) == []


def test_missing_labels_and_empty_texts_come_back_as_they_were(tmp_path):
    model = timm.create_model("resnet20_plain.cifar10").eval()
    unnamed = replace(CIFAR10, class_names=None)
    export(model, tmp_path / "x.onnx", model, dataset=unnamed, told={"entry": "test", "weights_sha256": ""})
    told = metadata_of(open_session(tmp_path / "x.onnx"))
    assert told["labels"] is None and told["weights_sha256"] == ""


def test_parity_counts_what_differs(static, tmp_path):
    model, folded = static("resnet20")
    export(folded, tmp_path / "x.onnx", model)
    with torch.no_grad():
        model.fc.bias[0] += 100.0
    parity = check_parity(
        runner(open_session(tmp_path / "x.onnx")), model, CIFAR10, PIXELS[:64], program="onnxruntime"
    )
    assert (
        not parity.passed and parity.same_top1 < 64 and parity.max_difference == pytest.approx(100, rel=0.01)
    )


@pytest.mark.parametrize("bad", [1, 64])
def test_an_answer_that_is_not_a_number_fails_even_where_the_model_says_the_same(bad):
    model = timm.create_model("resnet20_plain.cifar10").eval()
    model.register_forward_hook(lambda _, x, logits: logits.index_fill(0, torch.arange(bad), torch.nan))
    parity = check_parity(model, model, CIFAR10, PIXELS[:64], program="nan", tolerance=FLOAT16)
    assert not parity.passed and math.isnan(parity.max_difference)


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_what_differs_in_one_batch_alone_fails(wrong):
    model = timm.create_model("resnet20_plain.cifar10").eval()
    off = iter((wrong, 0.0))
    parity = check_parity(lambda x: model(x) + next(off), model, CIFAR10, PIXELS[:128], program="off")
    assert not parity.passed and not parity.max_difference < 0.99


def test_what_cannot_be_exported_or_opened_is_refused(tmp_path):
    model = timm.create_model("resnet20_plain.cifar10").eval()
    with pytest.raises(ValueError, match="at least 256 images, got 10"):
        export(model, tmp_path / "x.onnx", model, pixels=PIXELS[:10])
    with pytest.raises(ValueError, match="check it on are torch.float32, expected uint8; pass them as bytes"):
        tamzoo.export_entry(model, tmp_path / "x.onnx", pixels=PIXELS.float())
    with pytest.raises(ValueError, match="call model.eval"):
        export(model.train(), tmp_path / "x.onnx", model)
    with pytest.raises(ValueError, match="cannot write .* there is no folder"):
        export(model.eval(), tmp_path / "missing" / "x.onnx", model)
    with pytest.raises(ValueError, match="expected an ONNX file, found no such file"):
        open_session(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").write_text("no graph")
    with pytest.raises(ValueError, match="onnxruntime cannot open it"):
        open_session(tmp_path / "x.onnx")


def test_a_foreign_onnx_file_is_told_what_it_lacks(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(
        ValueError, match="not exported by tamzoo: its metadata lack entry, input, input_size, labels"
    ):
        metadata_of(open_session(tmp_path / "x.onnx"))
