"""Stand-ins: trained entries with random weights, laid out as the zoo's own; a disk that is full."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from PIL import Image

import tamzoo
from tamzoo.catalogue import ENTRIES, Entry
from tamzoo.checkpoint import save_weights
from tamzoo.recipes import RECIPES
from tamzoo.records import GateStats, Record, Score
from tamzoo.verify import write_cards
from tamzoo.weights import Trained

GATE = GateStats(
    name="layer1.0.se",
    block=1,
    stage=1,
    n=100,
    mean=0.5,
    std=0.0,
    min=0.5,
    max=0.5,
    bound_min=0.4,
    bound_max=0.6,
)


def draw(gates: list[GateStats], path: Path) -> None:
    Image.new("RGB", (4, max(len(gates), 1))).save(path)


def a_record(entry: Entry, sha256: str = "0" * 64, recipe: str = "short") -> Record:
    score = Score(
        dataset=entry.dataset.tag,
        n=10_000,
        top1_error=5.25,
        top5_error=0.25,
        loss=0.2,
        calibration_error=1.5,
        data_note="23 of 10000 test images from JPEG",
    )
    return Record(
        entry=entry.name,
        data=f"{entry.dataset.title} train",
        data_note="89 of 50000 train images from JPEG",
        n_train=50_000,
        seed=0,
        recipe=asdict(RECIPES[recipe]),
        epochs=30,
        selection="last epoch",
        precision="float32",
        hardware="none: a stand-in",
        seconds=3600.0,
        commit="0" * 40,
        versions={"torch": torch.__version__, "tamzoo": tamzoo.__version__},
        sha256=sha256,
        score=score,
        gates=[GATE] if entry.attention == "tam" else [],
    )


def stand_in(root: Path, name: str = "resnet20_tam.cifar10", seed: int = 0) -> Entry:
    """The entry as if trained, its folder of model_cards under `root`."""
    entry, files = _made(name, seed)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return entry


@cache
def _made(name: str, seed: int) -> tuple[Entry, dict[Path, bytes]]:
    with TemporaryDirectory() as root:
        entry = _make(Path(root), name, seed)
        paths = [path for path in Path(root).rglob("*") if path.is_file()]
        return entry, {path.relative_to(root): path.read_bytes() for path in paths}


def _make(root: Path, name: str, seed: int) -> Entry:
    folder = root / name
    folder.mkdir()
    torch.manual_seed(seed)
    state = timm.create_model(name).state_dict()
    # weights of another seed must differ at the same size, BatchNorm included
    state = {
        key: value + 0.01 * torch.rand_like(value) if value.ndim and "measured_gate" not in key else value
        for key, value in state.items()
    }
    sha256 = save_weights(folder / "model.safetensors", state)
    entry = replace(ENTRIES[name], trained=Trained(sha256=sha256, recipe="short"))
    (folder / "record.json").write_text(a_record(entry, sha256).to_json())
    (folder / "log.csv").write_text("epoch,lr\n1,0.1\n")
    write_cards(root, [entry], draw)
    return entry


@contextmanager
def full_disk(size: int = 100_000) -> Iterator[None]:
    """No file can grow over so many bytes: the operating system's own refusal, here a full disk's."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
