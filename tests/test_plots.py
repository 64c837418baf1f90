"""A picture a call, and a sentence where there is nothing to draw."""

import sys
from pathlib import Path

import pytest

from tamzoo.journal import LOG_FIELDS
from tamzoo.plots import COLOURS, line_style, plot_error, plot_latencies
from tamzoo.records import Timing


def logged(folder: Path, errors: list[float]) -> Path:
    folder.mkdir(parents=True)
    rows = [f"{epoch},0.1,1.0,{error},100.0,{epoch}.0" for epoch, error in enumerate(errors, start=1)]
    (folder / "log.csv").write_text("\n".join([",".join(LOG_FIELDS), *rows]) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_error_is_drawn_against_epoch(tmp_path, kind):
    pytest.importorskip("matplotlib")
    runs = [logged(tmp_path / name, [50.0, 20.0, 10.0 + index]) for index, name in enumerate("abc")]
    out = tmp_path / f"error.{kind}"
    runs.append(logged(tmp_path / "a$x^$", [50.0]))  # no formula
    plot_error([*runs, logged(tmp_path / "one_epoch", [30.0]), logged(tmp_path / "none", [])], out)
    assert out.stat().st_size > 1000
    if kind == "svg":
        text = out.read_text()
        assert all(colour.lower() in text.lower() for colour in COLOURS[:3])


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("tamzoo.plots.plot_curves", lambda curves, out: drawn.extend(curves))
    runs = [logged(tmp_path / parent / "run", [50.0]) for parent in "ab"]
    plot_error(runs, tmp_path / "x.png")
    assert [curve.model for curve in drawn] == list(map(str, runs))


def test_a_run_without_an_epoch_is_left_out(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    plot_error([begun, logged(tmp_path / "run", [50.0])], tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file() and f"{begun}: no epoch has ended yet; left out" in caplog.text
    with pytest.raises(ValueError, match=r"begun/log.csv: expected the log of a training run, found nothing"):
        plot_error([begun], tmp_path / "y.png")


def test_latencies_are_drawn_as_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        Timing(name=name, rounds=9, median_ms=1.0, ratio=ratio, ratio_low=ratio, ratio_high=1.1 * ratio)
        for name, ratio in (("plain", 1.0), ("int8", 0.4))
    ]
    plot_latencies({"batch 1": rows, "batch 16": rows}, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert all(colour.lower() in text.lower() for colour in COLOURS[:2])


def test_no_two_of_many_lines_look_alike():
    assert len({tuple(line_style(index).values()) for index in range(32)}) == 32


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    run = logged(tmp_path / "run", [10.0])
    with pytest.raises(
        ValueError, match=r"nowhere/log.csv: expected the log of a training run, found nothing"
    ):
        plot_error([tmp_path / "nowhere"], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x.bmp: expected a picture named .png, .svg or .pdf"):
        plot_error([run], tmp_path / "x.bmp")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder.png: expected the name of a file, found a folder"):
        plot_error([run], tmp_path / "folder.png")
    with pytest.raises(ValueError, match=r"x.png: there is no folder .*nowhere; make it first"):
        plot_error([run], tmp_path / "nowhere" / "x.png")
    (run / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"log.csv: not the log of a training run"):
        plot_error([run], tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"drawing needs matplotlib; pip install 'tamzoo\[plots\]'"):
        plot_error([run], tmp_path / "x.png")
