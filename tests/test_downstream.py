import timm
import torch
from torchvision.models.feature_extraction import get_graph_node_names

import tamzoo
from tamzoo.fold import report_of
from tamzoo.gates import gates_of


def static(shaken, **how):
    model = shaken(timm.create_model("resnet20_tam.cifar10", **how))
    for index, gate in enumerate(gates_of(model).values()):
        gate.tree[-1].weight.data.zero_()
        gate.tree[-1].bias.data.fill_(0.3 * index - 1)
    return model


def test_a_measurement_that_a_loader_rounded_is_not_folded_and_measuring_again_helps(shaken):
    model, x = static(shaken), torch.randn(4, 3, 32, 32)
    torch.nn.init.constant_(model.layer3[2].se.tree[-1].weight, 2e-3)
    gates = tamzoo.measure_gates(model, x)
    moves = gates[-1]
    assert 1e-4 < moves.width < 3e-3
    tamzoo.remember_gates(model, gates)
    for gate in gates_of(model).values():  # as transformers loads 16-bit weights: tensor by tensor
        gate.measured_gate = gate.measured_gate.to(torch.float16)
    model = model.float()
    report = report_of(tamzoo.reparameterize_model(model))
    assert not report.folded and "rounded to torch.float16" in report.kept["layer1.0.se"]
    report = report_of(tamzoo.reparameterize_model(model, gates))
    assert len(report.folded) == 8 and "exceeds" in report.kept[moves.name]
    assert report.folded[gates[0].name] == torch.tensor(gates[0].mean).item()


def test_looking_at_a_models_graph_forgets_no_gate(shaken):
    model = static(shaken)
    tamzoo.remember_gates(model, tamzoo.measure_gates(model, torch.randn(4, 3, 32, 32)))
    get_graph_node_names(model)  # traces in training mode, too
    assert len(report_of(tamzoo.reparameterize_model(model)).folded) == 9


def test_timm_saves_a_folded_model_as_the_plain_one_that_it_is(shaken, tmp_path):
    model, x = static(shaken, group_size=4, num_classes=3), torch.randn(4, 3, 32, 32)
    folded = tamzoo.reparameterize_model(model, tamzoo.measure_gates(model, x))
    timm.models.save_for_hf(folded, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), folded(x), rtol=0, atol=0)
    assert model.pretrained_cfg["architecture"] == "resnet20_tam"


def test_parity_counts_images_of_feature_maps_too(tmp_path):
    model = timm.create_model("resnet20_plain.cifar10", num_classes=0, global_pool="").eval()
    assert tamzoo.export_entry(model, tmp_path / "x.onnx")[1].same_top1 == 256
