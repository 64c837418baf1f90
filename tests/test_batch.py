"""Many predictions: every row once, whatever the input and whenever the job is killed."""

import errno
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import tamzoo.batch
from tamzoo.answers import Here, ahead, answer
from tamzoo.batch import Job, run_job
from tamzoo.images import PICTURES, open_picture
from tamzoo.parts import batches_of, list_parts, parts_folder
from tamzoo.shards import open_shard, shard_rows
from tests.colours import colour_classifier, colour_onnx, coloured, expect_colours
from tests.conftest import refused

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("tamzoo.parts.PART_ROWS", 10)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for n in range(120):
        path = folder / str(n // 50) / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(coloured(n))
    return folder


def shard(path: Path, cells: list, kind: pa.DataType, name: str = "image", group: int = 7) -> str:
    table = pa.table({"label": range(len(cells)), name: pa.array(cells, kind)})
    parquet.write_table(table, path, row_group_size=group)
    return str(path)


def job_of(given, out, **changes) -> Job:
    return replace(Job(model="colours", parts=list_parts([*map(str, given)], out), top=5, out=out), **changes)


def run(given, out, **changes):
    engine = Here(classifier=colour_classifier(), workers=2, batch=4)
    return run_job(job_of(given, out, **changes), engine)


def rows_of(out: Path) -> list[dict]:
    return parquet.read_table(out).to_pylist()


def test_every_picture_under_a_folder_is_a_row(pictures, tmp_path):
    (pictures / "notes.txt").write_text("no picture")
    (pictures / ".hidden.png").write_bytes(coloured(0))
    again = f"{pictures}/./1"
    done = run([pictures, pictures / "1", again], tmp_path / "x.parquet")  # a picture named twice is one row
    assert (done.rows, done.errors, done.predicted) == (120, 2, 120)
    rows = rows_of(tmp_path / "x.parquet")
    expect_colours(rows, 120)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(pictures.rglob("[0-9]*.png"))]
    for name, pattern in {"glob": "*/*.png", "deep": "**/[0-9]*.png"}.items():
        run([tmp_path / "p*" / pattern], tmp_path / f"{name}.parquet")
        assert rows_of(tmp_path / f"{name}.parquet") == rows
    left = ["deep.parquet", "glob.parquet", "pictures", "x.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="links need rights elsewhere")
def test_a_folder_holds_what_its_links_lead_to_once(pictures, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for link, there in {"a": pictures / "0", "b": pictures, "c": folder, "d": pictures / "1"}.items():
        (folder / link).symlink_to(there, target_is_directory=True)
    run([folder], tmp_path / "out.parquet")
    rows = rows_of(tmp_path / "out.parquet")
    expect_colours(rows, 120)
    assert [Path(row["path"]).parent for row in rows[::50]] == [folder / name for name in ("a", "b/1", "b/2")]


def test_a_shard_may_have_its_suffix_in_capitals(tmp_path):
    path = shard(tmp_path / "X.PARQUET", [coloured(n) for n in range(30)], pa.binary())
    for given in ([path], [tmp_path]):
        assert job_of(given, tmp_path / "out.parquet").parts[0].shard == path
    run([tmp_path], tmp_path / "out.parquet")
    expect_colours(rows_of(tmp_path / "out.parquet"), 30)


@pytest.mark.parametrize("layout", ["hub", "hub-paths", "bytes", "paths"])
def test_every_row_of_a_shard_is_a_row(pictures, tmp_path, layout):
    files = sorted(pictures.rglob("*.png"))
    paths = [str(path.relative_to(tmp_path)) for path in files]
    if layout == "hub":
        cells, kind = [{"bytes": file.read_bytes(), "path": "x"} for file in files], HUB
    elif layout == "hub-paths":
        cells, kind = [{"bytes": None, "path": path} for path in paths], HUB
    else:
        cells = [file.read_bytes() for file in files] if layout == "bytes" else paths
        kind = pa.binary() if layout == "bytes" else pa.string()
    path = shard(tmp_path / "x.parquet", cells, kind)
    run([path], tmp_path / "out.parquet")
    rows = rows_of(tmp_path / "out.parquet")
    expect_colours(rows, 120)
    assert [row["path"] for row in rows] == [f"{path}:{n}" for n in range(120)]


@pytest.mark.parametrize("group", [1, 7, 10, 64, 200])
def test_a_shard_reads_the_same_from_any_part(tmp_path, group):
    cells = [None if n == 5 else b"%d" % n for n in range(143)]
    parts = list_parts(
        [shard(tmp_path / "x.parquet", cells, pa.binary(), group=group)], tmp_path / "o.parquet"
    )
    assert [part.n for part in parts] == [10] * 14 + [3]
    for some in (parts, parts[9:], parts[::2], parts[5:6] + parts[11:], parts[::-1]):
        batches = list(batches_of(some, 4))
        found = [picture for batch in batches for _, picture in batch.rows]
        assert found == [cell for part in some for cell in cells[part.start : part.start + part.n]]
        assert [batch.part for batch in batches if batch.last] == some


def test_a_row_without_a_picture_says_so(tmp_path):
    path = shard(tmp_path / "x.parquet", [None, {"bytes": None, "path": None}, {"bytes": coloured(2)}], HUB)
    assert run([path], tmp_path / "out.parquet").errors == 2
    rows = rows_of(tmp_path / "out.parquet")
    assert [row["error"] for row in rows] == [
        f"{path}:{n}: expected a picture, found null" for n in (0, 1)
    ] + [None]
    assert rows[2]["label"] == "blue" and rows[0]["top"] is None


def test_a_shard_that_cannot_be_read_is_named_with_the_row(tmp_path):
    path = shard(tmp_path / "x.parquet", [os.urandom(999) for _ in range(300)], pa.binary(), group=100)
    column = parquet.read_metadata(path).row_group(2).column(1)
    content = bytearray(Path(path).read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(content)
    for start, row in ((0, 192), (210, 200)):
        with pytest.raises(
            ValueError, match=rf"x.parquet: cannot be read after row {row} \(.*\); fetch it again or"
        ):
            list(shard_rows(path, "image", start))
    Path(path).write_bytes(whole)
    with pytest.raises(ValueError, match=r"x.parquet: cannot be read after row 300 \(.*; fetch it again"):
        list(shard_rows(path, "image", 310))  # a start from when it was longer


class Unpickled(pa.ExtensionType):
    """As Ray registers one, whose values it unpickles."""

    def __init__(self):
        super().__init__(pa.binary(), "tamzoo.tests.unpickled")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls()

    def __arrow_ext_scalar_class__(self):
        return UnpickledScalar


class UnpickledScalar(pa.ExtensionScalar):
    def as_py(self, **options):
        raise AssertionError("a value of an extension type was made")


@pytest.fixture
def extension():
    """An extension type that is registered after a shard has been looked at, as in a worker of Ray's."""
    kind = Unpickled()
    yield kind, lambda: pa.register_extension_type(kind)
    with suppress(KeyError):
        pa.unregister_extension_type(kind.extension_name)


def test_values_of_extension_types_in_a_shard_are_never_made(tmp_path, extension):
    kind, register = extension
    hidden = pa.ExtensionArray.from_storage(kind, pa.array([b"x"], pa.binary()))
    struct = pa.StructArray.from_arrays([pa.array([coloured(2)]), hidden, hidden], ["bytes", "extra", "path"])
    for name, column in (("beside", struct), ("itself", hidden)):
        parquet.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")
        assert open_shard(str(tmp_path / f"{name}.parquet"))
    register()
    assert list(shard_rows(str(tmp_path / "beside.parquet"), "image", 0)) == [
        (f"{tmp_path / 'beside.parquet'}:0", coloured(2))
    ]
    with pytest.raises(ValueError, match=r"itself.parquet: cannot be read after row 0 \(expected pictures"):
        list(shard_rows(str(tmp_path / "itself.parquet"), "image", 0))


def test_odd_columns_of_a_shard_are_told(tmp_path):
    nested = pa.struct([("bytes", pa.struct([("bytes", pa.binary())]))])
    with pytest.raises(ValueError, match="no image column"):
        open_shard(shard(tmp_path / "nested.parquet", [{"bytes": {"bytes": b"x"}}], nested))
    numbered = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    path = shard(tmp_path / "numbered.parquet", [{"bytes": None, "path": 1}], numbered)
    assert list(shard_rows(path, "image", 0)) == [(f"{path}:0", None)]
    texts = pa.array([b"\xff.png"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"path": texts}), tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match=r"texts.parquet: cannot be read after row 0 \(.*can't decode"):
        list(shard_rows(str(tmp_path / "texts.parquet"), "path", 0))


def test_a_picture_that_the_system_refuses_is_one_error(pictures, tmp_path, monkeypatch):
    def refuses_one(path):
        if path.name == "007.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_picture(path)

    monkeypatch.setattr("tamzoo.answers.open_picture", refuses_one)
    assert run([pictures], tmp_path / "out.parquet").errors == 3
    assert "Permission denied" in rows_of(tmp_path / "out.parquet")[7]["error"]


def test_a_disk_that_fails_is_no_pictures_error(pictures, tmp_path, monkeypatch):
    def fails(path, **options):
        if Path(path).name == "107.png":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, **options)

    out, opened = tmp_path / "out.parquet", Image.open
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"Input/output error: .*107.png"):
        patch.setattr(Image, "open", fails)
        run([pictures], out)
    assert not out.exists() and list(parts_folder(out).glob("*.parquet"))
    assert 0 < run([pictures], out).predicted < 120
    expect_colours(rows_of(out), 120)


def test_a_shards_names_need_not_fit_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1"))
    cell = {"bytes": coloured(0), "path": "\u732b.png"}
    run([shard(tmp_path / "x.parquet", [cell], HUB)], tmp_path / "out.parquet")
    assert rows_of(tmp_path / "out.parquet")[0]["error"] is None


def test_what_the_single_picture_path_refuses_is_an_error_of_the_same_words(tmp_path):
    whole = (PICTURES / "cat.jpg").read_bytes()
    path = tmp_path / "half.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged") as refusal:
        open_picture(path)
    (row,) = answer(colour_classifier(), [(str(path), path)]).to_pylist()
    assert row["error"] == str(refusal.value)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are texts elsewhere")
def test_a_name_that_is_no_text_costs_nothing_but_its_odd_byte(tmp_path):
    (tmp_path / "pictures").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/pictures/\xff.png")).write_bytes(coloured(1))
    run([tmp_path / "pictures"], tmp_path / "x.parquet")
    (row,) = rows_of(tmp_path / "x.parquet")
    assert row["label"] == "green" and row["path"] == str(tmp_path / "pictures" / "\ufffd.png")


def test_a_job_goes_on_where_a_full_disk_stopped_it(pictures, tmp_path, monkeypatch):
    out, whole_file, written, room = tmp_path / "x.parquet", tamzoo.batch.whole_file, [], 0

    def fills(path):
        if len(written) == room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return whole_file(path)

    monkeypatch.setattr("tamzoo.batch.whole_file", fills)
    with pytest.raises(OSError, match=r"cannot write .*x.parquet: No space left on device$"):
        run([pictures], out)
    room = 5
    with pytest.raises(
        OSError,
        match=r"cannot write .*x.parquet: No space left on device; 50 of 120 rows are finished and kept",
    ):
        run([pictures], out)
    assert not out.exists()
    monkeypatch.undo()
    monkeypatch.setattr("tamzoo.parts.PART_ROWS", 10)
    (parts_folder(out) / ".00000005.parquet.1a2b3c4d.parquet").write_bytes(b"left by a kill")
    assert run([pictures], out).predicted == 70
    expect_colours(rows_of(out), 120)
    assert not parts_folder(out).exists()


def test_a_finished_job_is_not_done_again_and_no_other_is_overwritten(pictures, tmp_path):
    out = tmp_path / "x.parquet"
    run([pictures], out)
    parts_folder(out).mkdir()  # as a kill leaves it right after the output got its name
    done = run([pictures], out)
    assert (done.rows, done.errors, done.predicted) == (120, 2, 0) and not parts_folder(out).exists()
    for changes in ({"model": "another"}, {"top": 1}):
        with pytest.raises(ValueError, match="there already, not of this model and input"):
            run([pictures], out, **changes)
    expect_colours(rows_of(out), 120)


def test_the_parts_of_another_job_are_refused(pictures, tmp_path, monkeypatch):
    out = tmp_path / "x.parquet"
    monkeypatch.setattr("tamzoo.batch._merge", lambda job: sys.exit("killed"))
    with pytest.raises(SystemExit):
        run([pictures], out)
    with pytest.raises(ValueError, match=r"parts of another job \(other model\)"):
        run([pictures], out, model="another")
    (pictures / "0" / "000.png").rename(pictures / "0" / "000b.png")
    with pytest.raises(ValueError, match=r"parts of another job \(other input\)"):
        run([pictures], out)


@pytest.mark.parametrize("kind", ["picture", "shard"])
def test_an_input_that_has_changed_in_place_is_another_input(pictures, tmp_path, monkeypatch, kind):
    path = pictures / "0" / "000.png"
    if kind == "shard":
        path = Path(shard(tmp_path / "shard.parquet", [coloured(n) for n in range(12)], pa.binary()))
    run([path], tmp_path / "done.parquet")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("tamzoo.batch._merge", lambda job: sys.exit("killed"))
        run([path], tmp_path / "killed.parquet")
    found = path.stat()
    for content, ns in ((path.read_bytes(), 1), (path.read_bytes() + path.read_bytes(), 0)):
        path.write_bytes(content)  # of the same rows
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + ns))
        with pytest.raises(ValueError, match="there already, not of this model and input"):
            run([path], tmp_path / "done.parquet")
        with pytest.raises(ValueError, match=r"parts of another job \(other input\)"):
            run([path], tmp_path / "killed.parquet")


def test_two_calls_at_once_do_not_mix(pictures, tmp_path):
    out, refusals = tmp_path / "x.parquet", []

    def meanwhile(items, text):
        for model in ("colours", "another"):
            with pytest.raises(ValueError, match=r"x.parquet: another call is writing it; wait") as refusal:
                run([pictures], out, model=model)
            refusals.append(refusal)
        return items

    first = Here(classifier=colour_classifier(), workers=2, batch=4, progress=meanwhile)
    assert run_job(job_of([pictures], out), first).predicted == 120
    assert len(refusals) == 2 and not parts_folder(out).exists()
    expect_colours(rows_of(out), 120)


def test_what_another_call_has_finished_in_the_meantime_stays(pictures, tmp_path, monkeypatch):
    out, looked = tmp_path / "x.parquet", tamzoo.batch._is_finished

    def slow(job):
        found = looked(job)
        monkeypatch.setattr("tamzoo.batch._is_finished", looked)
        run([pictures], out)
        return found

    monkeypatch.setattr("tamzoo.batch._is_finished", slow)
    assert run([pictures], out).predicted == 0
    out.unlink()
    monkeypatch.setattr("tamzoo.batch._is_finished", slow)
    with pytest.raises(ValueError, match="there already, not of this model and input"):
        run([pictures], out, model="another")
    expect_colours(rows_of(out), 120)


@pytest.mark.parametrize("note", ["", "[]", "[1]", "null"])
def test_a_damaged_note_of_a_job_is_named(pictures, tmp_path, note):
    out = tmp_path / "x.parquet"
    parts_folder(out).mkdir()
    (parts_folder(out) / "job.json").write_text(note)
    with pytest.raises(ValueError, match=r"job.json is damaged \(.*\); remove .*x.parquet.parts and run"):
        run([pictures], out)


@pytest.mark.parametrize("wrong", ["truncated", "of other columns"])
def test_a_damaged_part_is_named_and_made_again_once_removed(pictures, tmp_path, monkeypatch, wrong):
    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("tamzoo.batch._merge", lambda job: sys.exit("killed"))
        run([pictures], out)
    part = parts_folder(out) / "00000001.parquet"
    if wrong == "truncated":
        os.truncate(part, part.stat().st_size // 2)
    else:
        shard(part, [coloured(0)], pa.binary())
    with pytest.raises(ValueError, match=r"00000001.parquet is damaged \(.*\); remove it and run the same"):
        run([pictures], out)
    assert not out.exists()
    part.unlink()
    assert run([pictures], out).predicted == 10
    expect_colours(rows_of(out), 120)


def test_parts_that_have_lost_their_note_are_not_kept(pictures, tmp_path):
    out = tmp_path / "x.parquet"
    parts_folder(out).mkdir()  # as a kill leaves it in mid removal
    (parts_folder(out) / "00000000.parquet").write_bytes(b"another job's")
    assert run([pictures], out).predicted == 120
    expect_colours(rows_of(out), 120)


def test_other_files_in_the_folder_of_the_parts_stay(pictures, tmp_path):
    out = tmp_path / "x.parquet"
    folder = parts_folder(out)
    others = [folder / "mine.parquet", folder / ".hidden", folder / "sub" / "notes.txt"]
    (folder / "sub").mkdir(parents=True)
    for path in others:
        path.write_text("precious")
    for _ in range(2):
        run([pictures], out)
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(others)
    expect_colours(rows_of(out), 120)


def test_an_output_among_its_inputs_is_no_input(pictures):
    out = pictures / "x.parquet"
    first = job_of([pictures], out)
    parts_folder(out).mkdir()
    shard(parts_folder(out) / "00000000.parquet", [coloured(0)], pa.binary())
    shard(out, [coloured(0)], pa.binary())
    for given in ([pictures], [pictures / "**"], [pictures, out]):
        assert job_of(given, out).identity["rows"] == first.identity["rows"] == 120


def test_predictions_are_no_input_of_another_job(pictures, tmp_path, monkeypatch):
    first, out = pictures / "0" / "012-first.parquet", pictures / "1" / "x.parquet"
    before = job_of([pictures], out).identity
    run([pictures], first)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("tamzoo.batch._merge", lambda job: sys.exit("killed"))
        run([pictures], pictures / "killed.parquet")
    parts = parts_folder(pictures / "killed.parquet")
    assert len(list(parts.glob("*.parquet"))) == 12
    assert job_of([pictures], out).identity == before
    for given in ([pictures / "**"], [pictures / "*"], [pictures / "**" / "*.p*"]):
        assert job_of(given, out).identity["rows"] == 120
    for path in (first, parts / "00000000.parquet"):
        with pytest.raises(ValueError, match=r"\.parquet: expected pictures, found predictions of tamzoo"):
            job_of([pictures, path], out)
    assert run([pictures, first], first).predicted == 0  # as the shell names it at the second call


def test_workers_are_few_batches_ahead_and_answers_stay_in_order():
    taken = []

    def items():
        for n in range(50):
            taken.append(n)
            yield n

    for n, found in enumerate(ahead(lambda x: x * x, items(), 3)):
        assert found == n * n and len(taken) <= n + 6
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda x: 1 // x, range(3), 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_job_ends_as_one_left_alone(tmp_path, kills):
    script = Path(__file__).with_name("batch_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "640 rows, the same as when left alone" in done.stdout


# The command line.

FOREIGN = ("--mean", 0, 0, 0, "--std", 1, 1, 1)


def test_the_command_tells_rows_errors_and_speed(tamzoo, pictures, tmp_path):
    onnx = colour_onnx(tmp_path / "x.onnx")
    arguments = (pictures, "--onnx", onnx, *FOREIGN, "-o", tmp_path / "out.parquet", "--batch", 7, "--top", 2)
    code, out, err = tamzoo("predict", *arguments)
    assert code == 0, err
    assert f"120 rows, 2 of them errors; the first: {pictures}" in out
    assert re.search(r"^120 rows in \d+\.\d s, \d+\.\d a second, on \d+ workers$", out, re.MULTILINE)
    rows = rows_of(tmp_path / "out.parquet")
    assert [row["index"] for row in rows[:6]] == [0, 1, 2, 0, 1, 2]
    assert rows[0]["label"] == "0" and len(rows[0]["top"]) == 2
    code, out, _ = tamzoo("predict", *arguments)
    assert code == 0 and "a second" not in out
    (tmp_path / "wrong.png").write_text("no picture")
    arguments = (tmp_path / "wrong.png", "--onnx", onnx, *FOREIGN, "-o", tmp_path / "wrong.parquet")
    code, out, _ = tamzoo("predict", *arguments)
    assert code == 1 and "1 rows, 1 of them errors" in out  # nothing was answered


def test_a_torch_model_predicts_in_batches_what_it_predicts_one_by_one(tamzoo, tmp_path):
    import json

    code, out, err = tamzoo("predict", PICTURES, "--json")
    single = json.loads(out)
    code, _, err = tamzoo("predict", PICTURES, "--out", tmp_path / "x.parquet", "--batch", 2)
    assert code == 0, err
    for row, expected in zip(rows_of(tmp_path / "x.parquet"), single, strict=True):
        assert row["path"] == expected["image"] and row["label"] == expected["top"][0]["label"]
        assert row["probability"] == pytest.approx(expected["top"][0]["probability"], abs=1e-5)


def test_bad_inputs_are_refused_in_one_sentence(tamzoo, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("x")
    parquet.write_table(pa.table({"label": [1], "text": ["x"]}), tmp_path / "labels.parquet")
    parquet.write_table(pa.table({"a": [b"x"], "b": [b"x"]}), tmp_path / "two.parquet")
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_text("x")
    out = ("--out", tmp_path / "out.parquet")
    for name, words in {
        "empty": "an empty folder; expected .jpg",
        "texts": "a folder of 1 files, none a picture",
        "*.jpg": "matches nothing",
        "missing": "found nothing",
        "labels.parquet": "no image column, expected {bytes, path}, bytes or paths of pictures; found label",
        "two.parquet": "several columns",
        "none.parquet": "no rows, so nothing to predict",
        "broken.parquet": "not a whole parquet file",
    }.items():
        refused(tamzoo("predict", tmp_path / name, *out), words)
    refused(tamzoo("predict", tmp_path / "two.parquet", *out, "--column", "c"), "no column c with pictures")
    refused(tamzoo("predict", pictures, "--onnx", tmp_path / "x.onnx", *out), "expected an ONNX file, found")
    foreign = colour_onnx(tmp_path / "x.onnx")
    refused(
        tamzoo("predict", pictures, "--onnx", foreign, *out), "lack entry", "--mean R G B", "--labels FILE"
    )
    refused(tamzoo("predict", pictures, *FOREIGN, *out), "pass --onnx FILE too")
    assert not (tmp_path / "out.parquet").exists() and not parts_folder(tmp_path / "out.parquet").exists()


def test_without_pyarrow_there_is_one_sentence_and_no_folder(tamzoo, pictures, tmp_path, monkeypatch):
    onnx = colour_onnx(tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    given = (pictures, "--onnx", onnx, *FOREIGN, "--out", tmp_path / "out.parquet")
    refused(tamzoo("predict", *given), "parquet needs pyarrow; pip install")
    assert not parts_folder(tmp_path / "out.parquet").exists()


def test_bad_outputs_are_refused_before_any_work(tamzoo, pictures, tmp_path):
    refused(
        tamzoo("predict", pictures, "--out", tmp_path / "x.csv"), "expected an output that ends in .parquet"
    )
    refused(tamzoo("predict", pictures, "--out", tmp_path / "no" / "x.parquet"), "there is no folder")
    (tmp_path / "x.parquet").mkdir()
    refused(tamzoo("predict", pictures, "--out", tmp_path / "x.parquet"), "found a folder")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    refused(tamzoo("predict", pictures, "--out", tmp_path / "other.parquet"), "is there already")
