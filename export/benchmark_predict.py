"""Measures `tamzoo predict --out` against onnxruntime alone, and its peak memory at N and at 10 N rows.

python -m export.benchmark_predict speed|memory FOLDER ONNX SHARD [ROUNDS]

SHARD is a parquet file of N pictures, for instance CIFAR-10's test split. In FOLDER, which must exist, the
pictures are written as PNG files once. Ratios are rates over that of onnxruntime alone: one session with its
own choice of threads, the same batch again and again.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from tamzoo.answers import Here, workers_and_threads
from tamzoo.batch import Job, run_job
from tamzoo.images import decode_picture, open_picture
from tamzoo.latency import time_in_turns
from tamzoo.onnx_export import open_session
from tamzoo.parts import batches_of, list_parts
from tamzoo.predict import BATCH, open_classifier
from tamzoo.terminal import one_sentence


def png_folder(folder: Path, shard: Path) -> Path:
    """The pictures of a shard as PNG files."""
    import io

    out = folder / f"png-{shard.stem}"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            part = Path(unfinished) / "png"
            part.mkdir()
            for number, batch in enumerate(batches_of(list_parts([str(shard)], out), BATCH)):
                for row, (key, cell) in enumerate(batch.rows):
                    picture = decode_picture(io.BytesIO(cell), key) if isinstance(cell, bytes) else None
                    assert picture, f"{key}: expected bytes"
                    picture.save(part / f"{number:05d}-{row:02d}.png")
            part.rename(out)
    return out


def alone(onnx: Path, threads: int, workers: int, batch: np.ndarray, n: int) -> Callable[[], Any]:
    """onnxruntime on the same batch until n pictures are through, from several threads at once."""
    session = open_session(onnx, threads)
    feed = session.get_inputs()[0].name
    sizes = [min(BATCH, n - start) for start in range(0, n, BATCH)]

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda size: session.run(None, {feed: batch[:size]}), sizes))

    return run


def job(onnx: Path, given: Path) -> None:
    workers, threads = workers_and_threads()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.parquet"
        classifier = open_classifier(onnx, threads)
        parts = list_parts([str(given)], out)
        run_job(Job(model="timed", parts=parts, top=5, out=out), Here(classifier=classifier, workers=workers))


def speed(folder: Path, onnx: Path, shard: Path, rounds: int) -> None:
    n, pngs = parquet.read_metadata(shard).num_rows, png_folder(folder, shard)
    classifier = open_classifier(onnx)
    paths = sorted(pngs.iterdir())[:BATCH]
    pixels = np.stack([classifier.pixels(open_picture(path)) for path in paths])
    batch = pixels if classifier.raw else classifier._normalised(pixels)
    workers, threads = workers_and_threads()
    programs: dict[str, Callable[[], object]] = {
        "onnxruntime alone": alone(onnx, 0, 1, batch, n),
        f"the same, {workers} runs at once": alone(onnx, threads, workers, batch, n),
        "tamzoo predict, parquet": partial(job, onnx, shard),
        "tamzoo predict, PNG files": partial(job, onnx, pngs),
    }
    for timing in time_in_turns(programs, rounds=rounds, warmup=1):
        rates = [1 / ratio for ratio in (timing.ratio, timing.ratio_high, timing.ratio_low)]
        print(
            f"{timing.name:28s} {1e3 * n / timing.median_ms:8.1f} images/s, ratio {rates[0]:.3f} "
            f"({rates[1]:.3f} to {rates[2]:.3f})"
        )


def memory(folder: Path, onnx: Path, shard: Path) -> None:
    many = folder / "many"
    many.mkdir(exist_ok=True)
    for copy in range(10):
        (many / f"{copy}.parquet").unlink(missing_ok=True)
        (many / f"{copy}.parquet").symlink_to(shard.resolve())
    for given in (shard, many):
        subprocess.run(
            [sys.executable, "-m", "export.benchmark_predict", "peak", folder, onnx, given], check=True
        )


def peak(onnx: Path, given: Path) -> None:
    job(onnx, given)
    rows = sum(part.n for part in list_parts([str(given)], Path("x.parquet")))
    print(f"{rows} rows: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m export.benchmark_predict", description=__doc__)
    parser.add_argument("what", choices=("speed", "memory", "peak"), help="peak: of one job on SHARD")
    for name in ("folder", "onnx", "shard"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    parser.add_argument("rounds", type=int, nargs="?", default=5, metavar="ROUNDS")
    options = parser.parse_args()
    with one_sentence():
        if options.what == "speed":
            speed(options.folder, options.onnx, options.shard, options.rounds)
        elif options.what == "memory":
            memory(options.folder, options.onnx, options.shard)
        else:
            peak(options.onnx, options.shard)


if __name__ == "__main__":
    main()
