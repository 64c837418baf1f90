"""The command that shows the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tamzoo.terminal import DEMO_ENTRY, bar, load_model, print_gates

if TYPE_CHECKING:
    from tamzoo.datasets import Dataset


def demo() -> None:
    """The main job, on a shipped checkpoint: classify, measure the gates, fold, export, compare, time."""
    import tempfile
    import time

    from tamzoo.data import darkest_and_brightest, normalise
    from tamzoo.gates import measure_gates
    from tamzoo.images import random_crops, shipped_pictures
    from tamzoo.onnx_export import export_entry, metadata_of, onnx_libraries, open_session
    from tamzoo.predict import onnx_classifier, torch_classifier
    from tamzoo.predict import predict as classify

    onnx_libraries()  # before half of the demo is done
    began = time.monotonic()
    model, full, dataset = load_model(DEMO_ENTRY)
    print(f"1. {full}, a {dataset.title} model, on pictures that it has never seen:")
    paths = shipped_pictures()
    answers = classify(torch_classifier(model), paths, 3)
    for path, answer in zip(paths, answers, strict=True):
        print(f"   {path.name:14s} " + ", ".join(f"{label} {100 * p:.0f} %" for label, p in answer))
    print("   Of these, only a cat and a horse are among its ten classes.")

    pixels = random_crops(256, dataset.input_size[-1])
    print("\n2. Do the attention gates depend on the picture?")
    gates = measure_gates(model, normalise(pixels, dataset), ends=darkest_and_brightest(dataset))
    print_gates(gates, "256 crops and noise")

    with tempfile.TemporaryDirectory() as folder:
        print("3. Fold, export to ONNX, and compare with the unfolded torch model:")
        files = {"TAM folded": Path(folder) / "folded.onnx", "TAM": Path(folder) / "tam.onnx"}
        for line in export_entry(model, files["TAM folded"]):
            print(line)
        export_entry(model, files["TAM"], keep_gates=True)
        session = open_session(files["TAM folded"])
        again = classify(onnx_classifier(session, metadata_of(session)), paths, 1)
        same = sum(a[0][0] == b[0][0] for a, b in zip(answers, again, strict=True))
        print(f"   The ONNX file names the same class on {same} of {len(paths)} pictures.")

        print("\n4. Latency in onnxruntime, batch 1, one thread, programs taking turns:")
        _time_demo(files, dataset, Path(folder) / "plain.onnx")
    print(f"\n{time.monotonic() - began:.0f} s in all.")


def _time_demo(files: dict[str, Path], dataset: Dataset, plain: Path) -> None:
    import timm

    from tamzoo.data import normalise
    from tamzoo.images import random_crops
    from tamzoo.latency import time_in_turns
    from tamzoo.onnx_export import export_entry, open_session

    # untrained: the weights' values do not change the time
    export_entry(timm.create_model(DEMO_ENTRY.replace("_tam", "_plain")).eval(), plain)
    image = {"pixel_values": normalise(random_crops(1, dataset.input_size[-1]), dataset).numpy()}
    sessions = {name: open_session(path, threads=1) for name, path in ({"plain": plain} | files).items()}
    programs = {name: (lambda s=session: s.run(None, image)) for name, session in sessions.items()}
    for timing in time_in_turns(programs, rounds=200, progress=bar):
        print(
            f"   {timing.name:10s} {timing.median_ms:6.2f} ms, {timing.ratio:.2f} of plain "
            f"(quartiles {timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
        )
