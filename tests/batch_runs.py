"""Kills a job of predictions at random moments, calls it again each time, and compares with one left alone.

python tests/batch_runs.py FOLDER KILLS SEED
"""

import os
import random
import sys
import time
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet

import tamzoo.parts
from tamzoo.answers import Here, answer
from tamzoo.batch import Job, run_job
from tests.colours import colour_classifier, coloured, expect_colours
from tests.tiny_runs import in_a_fork, killed_in_a_fork

PICTURES, SHARD_ROWS = 300, 340
tamzoo.parts.PART_ROWS = 16


def make_inputs(folder: Path) -> None:
    """A folder of pictures and a shard."""
    (folder / "pictures").mkdir()
    for n in range(PICTURES):
        (folder / "pictures" / f"{n:04d}.png").write_bytes(coloured(n))
    cells = [{"bytes": coloured(n), "path": None} for n in range(PICTURES, PICTURES + SHARD_ROWS)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "x.parquet", row_group_size=50)


def predict(given: list[str], out: Path) -> None:
    parts = tamzoo.parts.list_parts(given, out)
    engine = Here(classifier=colour_classifier(seconds=0.01), workers=2, batch=8)
    run_job(Job(model="colours", parts=parts, top=5, out=out), engine)


def rows_kept(out: Path) -> str:
    if out.exists():
        return f"all {parquet.read_metadata(out).num_rows}"
    parts = tamzoo.parts.parts_folder(out).glob("0*.parquet")
    return str(sum(parquet.read_metadata(part).num_rows for part in parts))


def main(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    torch.set_num_threads(1)
    answer(colour_classifier(), [("x", coloured(0))])  # what libraries load at their first use
    given = [str(folder / "pictures"), str(folder / "x.parquet")]
    assert os.waitpid(in_a_fork(lambda: make_inputs(folder)), 0)[1] == 0
    began = time.monotonic()
    assert os.waitpid(in_a_fork(lambda: predict(given, folder / "alone.parquet")), 0)[1] == 0
    seconds, killed, series, outputs = time.monotonic() - began, 0, 0, []
    while killed < kills:
        out = folder / f"killed-{series}.parquet"
        while True:
            delay = chance.uniform(0.0, 0.7 * seconds) if killed < kills else float("inf")
            if not killed_in_a_fork(lambda out=out: predict(given, out), delay):
                break
            killed += 1
            print(f"kill {killed} after {delay:.3f} s, rows kept: {rows_kept(out)}")
        outputs.append(out)
        series += 1
    alone = parquet.read_table(folder / "alone.parquet")
    expect_colours(alone.to_pylist(), PICTURES + SHARD_ROWS)
    for out in outputs:
        assert parquet.read_table(out).equals(alone), out
        print(f"{out.name}: {alone.num_rows} rows, the same as when left alone")
    assert not list(folder.glob("*.parts")) and not list(folder.glob(".*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
