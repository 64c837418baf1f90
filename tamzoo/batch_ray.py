"""The engine of a cluster: the same parts, answered by Ray Data's workers."""

import io
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tamzoo.answers import answer
from tamzoo.parts import Part, batches_of
from tamzoo.predict import BATCH, Classifier
from tamzoo.progress import Counted, Progress, silent

CONNECT_SECONDS = 10
# Ray reads these at its import; without them its attempts to connect go on for many minutes
PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": str(CONNECT_SECONDS)}


class OnRay:
    """Ray Data's workers, one a CPU of the cluster, each with a model of its own.

    A task is a part, and its answer comes back as a whole: where a worker dies, another one gets the part.
    The workers open the inputs and the model under the names that they have here, relative ones in the same
    folder, as on a shared disk, and need tamzoo; only this process writes.
    """

    def __init__(
        self,
        address: str,
        load: Callable[[int], Classifier],
        sha256: str,
        batch: int = BATCH,
        top: int = 5,
        progress: Progress = silent,
    ) -> None:
        """Connects.

        Args:
            address: HOST:PORT of a cluster's head, ray://HOST:PORT, `auto` for the cluster that this machine
                is part of, or `local` for one that lives as long as this process.
            load: Makes the classifier, with a number of threads, on a worker.
            sha256: The classifier's, which the workers compare with what they load.
        Raises:
            ValueError: no Ray here, or none at the address.
        """
        self._ray = _connect(address)
        self._arguments = (str(Path.cwd()), load, sha256, batch, top)
        self._progress = progress
        self.workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def __call__(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        if not parts:
            return
        import pyarrow as pa

        data = self._ray.data
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised too
        answers = data.from_items(
            [asdict(part) | {"paths": list(part.paths)} for part in parts], override_num_blocks=len(parts)
        ).map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(self.workers, len(parts))),
            fn_constructor_args=self._arguments,
            num_cpus=1,
        )
        numbered = {part.index: part for part in parts}
        try:
            for row in self._progress(Counted(answers.iter_rows(), len(parts)), "Predicting"):
                yield numbered[row["index"]], pa.ipc.open_stream(row["table"]).read_all()
        except self._ray.exceptions.RayError as error:
            told = str(error).strip().splitlines()[-1]  # above it is the worker's traceback
            raise ValueError(f"a worker on Ray failed: {told}") from error


class _Worker:
    """What answers one part after the other in a process of its own."""

    def __init__(
        self, folder: str, load: Callable[[int], Classifier], sha256: str, batch: int, top: int
    ) -> None:
        os.chdir(folder)  # Ray starts it in the folder of the cluster's head
        self.classifier, self.top = load(1), top
        if self.classifier.sha256 != sha256:
            raise ValueError(f"another model on {socket.gethostname()} than here, under the same name")
        self.given: list[Part] = []
        # one for all parts, so that a row group of several is read once
        self.batches = batches_of(iter(self.given.pop, None), batch)

    def __call__(self, block: Any) -> Any:
        """A row that holds a part -> a row that holds its answer."""
        import pyarrow as pa

        (part,) = (Part(**row) for row in block.to_pylist())
        self.given.append(part)
        tables: list[Any] = []
        for batch in self.batches:
            tables.append(answer(self.classifier, batch.rows, self.top))
            if batch.last:
                break
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, tables[0].schema) as writer:
            writer.write_table(pa.concat_tables(tables))
        return pa.table({"index": [part.index], "table": [stream.getvalue()]})


def _connect(address: str) -> Any:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray; pip install 'tamzoo[ray]'") from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    unreachable = f"{address}: no Ray cluster there; start one with `ray start --head`, or pass --ray local"
    if address not in ("local", "auto"):
        if not host or not port.isdigit():
            raise ValueError(
                f"{address}: expected HOST:PORT of a Ray cluster, ray://HOST:PORT, auto or local"
            )
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"{unreachable} ({error})") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(unreachable) from error
    return ray
