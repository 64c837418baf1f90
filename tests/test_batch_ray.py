"""The same job on a cluster: every row once, whichever worker dies."""

import os
import signal
import socket
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tamzoo.answers import Here
from tamzoo.batch import Job, run_job
from tamzoo.batch_ray import OnRay, _Worker
from tamzoo.parts import list_parts
from tests.colours import colour_classifier, coloured, expect_colours
from tests.conftest import refused

ray = pytest.importorskip("ray")
ROWS = 400
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of settings that Ray sets itself


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield "local"
    ray.shutdown()


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"image": pa.array([coloured(n) for n in range(ROWS)], pa.binary())})
    parquet.write_table(table, path, row_group_size=70)
    return path


def job_of(shard, out, monkeypatch) -> Job:
    monkeypatch.setattr("tamzoo.parts.PART_ROWS", 20)
    return Job(model="colours", parts=list_parts([str(shard)], out), top=5, out=out)


def kill_one(folder, killed: list[int]) -> None:
    """Kills the first worker that is at work while another one is too."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(found := sorted(folder.iterdir())) == 2:
            os.kill(int(found[0].name), signal.SIGKILL)
            return killed.append(int(found[0].name))
        time.sleep(0.01)


@pytest.mark.slow
def test_with_a_worker_killed_in_mid_run_every_row_is_there_once(cluster, shard, tmp_path, monkeypatch):
    (tmp_path / "workers").mkdir()
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "workers", killed))
    killer.start()
    load = partial(colour_classifier, tmp_path / "workers", seconds=0.05)
    engine = OnRay(cluster, load, "colours", batch=4)
    done = run_job(job_of(shard, tmp_path / "ray.parquet", monkeypatch), engine)
    killer.join()
    workers = [int(path.name) for path in (tmp_path / "workers").iterdir()]
    print(f"worker {killed} of {workers} killed; {done}")
    assert len(killed) == 1 and len(workers) >= 2
    assert (done.rows, done.errors, done.predicted) == (ROWS, ROWS // 50, ROWS)

    here = Here(classifier=colour_classifier(), workers=2, batch=4)
    run_job(job_of(shard, tmp_path / "here.parquet", monkeypatch), here)
    found = parquet.read_table(tmp_path / "ray.parquet")
    expect_colours(found.to_pylist(), ROWS)
    assert found.equals(parquet.read_table(tmp_path / "here.parquet"))


def test_a_worker_reads_a_row_group_once_for_all_its_parts(shard, tmp_path, monkeypatch):
    parquet.write_table(parquet.read_table(shard), shard, row_group_size=ROWS)
    parts = job_of(shard, tmp_path / "out.parquet", monkeypatch).parts
    worker = _Worker(str(Path.cwd()), partial(colour_classifier, None), "colours", batch=8, top=5)
    decoded, iter_batches = [0], parquet.ParquetFile.iter_batches

    def counted(*arguments, **options):
        for batch in iter_batches(*arguments, **options):
            decoded[0] += len(batch)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    rows = []
    for part in parts[::3]:  # others have the rest
        (found,) = worker(pa.Table.from_pylist([asdict(part) | {"paths": []}])).to_pylist()
        rows += pa.ipc.open_stream(found["table"]).read_all().to_pylist()
    assert [row["path"] for row in rows] == [
        f"{shard}:{n}" for part in parts[::3] for n in range(part.start, part.start + part.n)
    ]
    assert decoded[0] <= ROWS


@pytest.mark.slow
def test_relative_names_mean_to_workers_what_they_mean_here(cluster, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(coloured(n))
    monkeypatch.chdir(tmp_path)  # the cluster was started elsewhere
    out = Path("out.parquet")
    engine = OnRay(cluster, partial(colour_classifier, None), "colours")
    run_job(Job(model="colours", parts=list_parts(["pictures"], out), top=5, out=out), engine)
    rows = parquet.read_table(out).to_pylist()
    expect_colours(rows, 3)
    assert [row["path"] for row in rows] == [f"pictures/{n}.png" for n in range(3)]


@pytest.mark.slow
def test_a_worker_with_another_model_is_refused(cluster, shard, tmp_path, monkeypatch):
    engine = OnRay(cluster, colour_classifier, "another")
    with pytest.raises(ValueError, match="a worker on Ray failed: ValueError: another model on") as refusal:
        run_job(job_of(shard, tmp_path / "out.parquet", monkeypatch), engine)
    assert "\n" not in str(refusal.value)


def test_addresses_without_a_cluster_are_refused(tamzoo, shard, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        common = ("predict", shard, "--out", tmp_path / "out.parquet", "--ray")
        refused(
            tamzoo(*common, address), f"{address}: no Ray cluster there; start one with `ray start --head`"
        )
    refused(tamzoo(*common, "nowhere"), "nowhere: expected HOST:PORT of a Ray cluster")
