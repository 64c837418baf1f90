"""Imports run one way: a room may use those before it in this list, never those after."""

import ast
from pathlib import Path

import pytest

import tamzoo

ROOMS = tuple(
    """
        allocator cache distributed tree_cpu tree_triton tree attention progress recipes records findings
        class_names datasets paper weights catalogue bounds backbones block_end wide_resnet checkpoint
        card_texts card_training cards hub registry images shards sources data augment evaluate gates fold
        freeze deploy onnx_export program_export quantise predict parts answers batch batch_ray spreads
        studies latency results verify staging publish clock snapshots journal subjects analysis replay
        learner train finish session sweep plots plots_analysis terminal cli_predict cli_analyze cli_gates
        cli_export cli_demo cli_train cli_hub cli __main__
    """.split()
)
PACKAGE = Path(tamzoo.__file__).parent


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "tamzoo" else {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_list_names_every_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    modules = imported(PACKAGE / f"{room}.py")
    ours = {name.split(".")[1] for name in modules if name.startswith("tamzoo.")} & set(ROOMS)
    later = {name for name in ours if ROOMS.index(name) >= ROOMS.index(room)}
    assert not later, f"{room} imports {later}"
    assert not any(name.split(".")[0] in ("export", "tests") for name in modules)


def test_only_the_command_line_prints():
    for path in PACKAGE.glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert not prints or path.stem.startswith(("cli", "terminal")), path.name


def test_the_public_names_are_these():
    assert tamzoo.__all__ == [
        "CBAM",
        "SE",
        "TAM",
        "export_entry",
        "measure_gates",
        "remember_gates",
        "reparameterize_model",
    ]
