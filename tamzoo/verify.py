"""The rendered files of every entry on disk, and what is wrong with a folder or a Hub repository of one."""

import json
from collections.abc import Callable, Iterable
from math import inf, isfinite
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi

from tamzoo.cards import card_files, pictures
from tamzoo.catalogue import ENTRIES, HUB_OWNER, OWNER, Entry
from tamzoo.checkpoint import WEIGHTS, load_weights, sha256_of, write_whole
from tamzoo.evaluate import golden_logits
from tamzoo.findings import ANALYSIS, Analysis, read_analysis
from tamzoo.hub import HUB_ERRORS, explain, hash_like, listing
from tamzoo.records import GateStats, Record, read_record

ONNX = "onnx/model.onnx"
GOLDEN_TOLERANCE = 1e-3  # logits are of order 10; float32 kernels of other machines differ by about 1e-5


def _golden(entry: Entry, folder: Path) -> list[float]:
    """Golden logits of the folder's weights; those already in its config.json where they still hold."""
    model = timm.create_model(entry.name).eval()
    load_weights(model, folder / WEIGHTS, entry.name)
    found, stored = golden_logits(model, entry.dataset), stored_golden(folder)
    return stored if stored and _apart(stored, found) < GOLDEN_TOLERANCE else found


def stored_golden(folder: Path) -> list[float] | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["golden_logits"]
        return [float(logit) for logit in found]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored_analysis(folder: Path) -> Analysis | None:
    """Raises ValueError where the folder's file is no analysis."""
    return read_analysis(folder / ANALYSIS) if (folder / ANALYSIS).is_file() else None


def stored_run(entry: Entry, folder: Path) -> Record | None:
    """The record of an entry that was trained and has no weights; raises ValueError where it is none."""
    path = folder / "record.json"
    return read_record(path) if not entry.trained and path.is_file() else None


def _apart(left: list[float], right: list[float]) -> float:
    if len(left) != len(right):
        return inf
    gaps = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return max(gaps) if all(map(isfinite, gaps)) else inf  # max passes over NaN


def write_cards(
    root: Path,
    entries: Iterable[Entry] = tuple(ENTRIES.values()),
    draw: Callable[[list[GateStats], Path], Any] | None = None,
    draw_analysis: Callable[[Analysis, Path], list[Path]] | None = None,
) -> list[Path]:
    """(Re)writes the rendered files of every entry's folder under `root` and returns those that changed.

    Args:
        draw: Draws the gates into a file where a record has gates and `gates.png` is not there, or
            config.json told of other weights.
        draw_analysis: Draws an analysis into its folder where one of its pictures is not there.
    Raises:
        ValueError: a trained entry's folder lacks its weights or record.
    """
    changed = []
    for entry in entries:
        folder = root / entry.name
        record = read_record(folder / "record.json") if entry.trained else None
        golden = _golden(entry, folder) if entry.trained else None
        analysis, run = stored_analysis(folder), stored_run(entry, folder)
        texts = card_files(entry, record, golden, analysis=analysis, run=run)
        picture, config = folder / "gates.png", folder / "config.json"
        # drawn first: were it interrupted, the next call would still see that the texts are of other weights
        known = picture.exists() and config.is_file() and config.read_bytes() == texts["config.json"].encode()
        if draw and record and record.gates and not known:
            draw(record.gates, picture)
            changed.append(picture)
        for path, text in texts.items():
            file = folder / path
            if not file.is_file() or file.read_bytes() != text.encode():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, text)
                changed.append(file)
        if (
            draw_analysis
            and analysis
            and not all((folder / path).is_file() for path in pictures(record, analysis))
        ):
            changed += draw_analysis(analysis, folder)
    return changed


def verify_folder(entry: Entry, folder: Path, owner: str = OWNER) -> list[str]:
    """What is wrong with a folder that should be an entry's; empty where nothing is."""
    wanted = ["README.md", "config.json"]
    if entry.trained:
        wanted += [WEIGHTS, "record.json", "log.csv"]
    missing = [path for path in wanted if not (folder / path).is_file()]
    if missing:
        return [f"{path} is missing" for path in missing]
    problems = []
    try:
        record = read_record(folder / "record.json") if entry.trained else None
        analysis, run = stored_analysis(folder), stored_run(entry, folder)
    except ValueError as error:
        return [str(error)]
    if record:
        problems += _check_hashes(entry, folder, record, analysis)
        shown = pictures(record, analysis)
        problems += [f"{path} is missing" for path in shown if not (folder / path).is_file()]
    golden = stored_golden(folder)
    for path, text in card_files(entry, record, golden, owner, analysis, run).items():
        file = folder / path
        if not file.is_file() or file.read_bytes() != text.encode():
            problems.append(f"{path} is not what the catalogue and the record render to")
    if not problems:
        problems += _check_model(entry, folder, golden)
    return problems


def _check_hashes(entry: Entry, folder: Path, record: Record, analysis: Analysis | None) -> list[str]:
    assert entry.trained is not None
    wanted, problems = entry.trained.sha256, []
    hashes = {WEIGHTS: sha256_of(folder / WEIGHTS), "record.json": record.sha256}
    for what, found in (hashes | ({ANALYSIS: analysis.sha256} if analysis else {})).items():
        if found != wanted:
            problems.append(f"{what}: SHA-256 is {found[:12]}..., the catalogue says {wanted[:12]}...")
    return problems


def _check_model(entry: Entry, folder: Path, golden: list[float] | None) -> list[str]:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=entry.trained is not None).eval()
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        return [f"config.json does not build the model: {error}"]
    if entry.trained is None:
        return []
    if golden is None:
        return ["config.json stores no golden logits"]
    apart = _apart(golden, golden_logits(model, entry.dataset))
    return [f"the golden logits are off by {apart:.2g}"] if apart >= GOLDEN_TOLERANCE else []


def verify_remote(
    entry: Entry, api: HfApi, owner: str = HUB_OWNER, cache_dir: Path | None = None
) -> list[str]:
    """What is wrong with an entry's Hub repository: as `verify_folder`, and that the ONNX file is there.

    The head is downloaded, and its files are compared with the hashes that the Hub lists; at the
    catalogue's revision, whose card may be an older one, the weights must be the head's.
    """
    repo_id = f"{owner}/{entry.name}"
    revision = entry.trained.revision if entry.trained else None
    try:
        folder = Path(api.snapshot_download(repo_id, cache_dir=cache_dir))
        listed = listing(api, repo_id)[1]
        at_revision = listing(api, repo_id, revision)[1]
    except HUB_ERRORS as error:
        return [explain(error, repo_id, revision, api.endpoint)]
    problems = [
        f"{path} differs from what the Hub lists"
        for path, oid in listed.items()
        if not (folder / path).is_file() or hash_like(oid, folder / path) != oid
    ]
    if entry.trained and ONNX not in listed:
        problems.append(f"{ONNX} is missing")
    if at_revision.get(WEIGHTS) != listed.get(WEIGHTS):
        problems.append(f"{WEIGHTS} at {revision} is not the head's")
    return problems + verify_folder(entry, folder, owner)
