"""Runs stop and go on anywhere, keep what was good, and store what they evaluate."""

import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tamzoo import journal, snapshots
from tamzoo.augment import augment, draw
from tamzoo.catalogue import ENTRIES, QUEUE
from tamzoo.checkpoint import load_weights, sha256_of, whole_file
from tamzoo.clock import Clock
from tamzoo.datasets import DATASETS
from tamzoo.distributed import World
from tamzoo.evaluate import evaluate
from tamzoo.finish import finish
from tamzoo.learner import Learner, seed_of
from tamzoo.progress import SILENT, Voice
from tamzoo.records import read_record
from tamzoo.results import record_of
from tamzoo.session import Order, train_entries, waiting
from tamzoo.snapshots import load_snapshot
from tamzoo.train import Run, how_on
from tamzoo.weights import Trained
from tests.standins import a_record, full_disk
from tests.tiny_runs import ENTRY, RECIPE, random_split, tiny_run

CPU = World(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    found = load_snapshot(folder)
    assert found is not None
    return found[0]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    run = tiny_run(folder, snapshot_seconds=math.inf)
    assert run.train()
    finish(run)
    return folder


def steps(n: int):
    """A watch that ends the session's budget after n steps."""

    def watch(moment) -> None:
        if moment.step % 9 == n % 9:
            watch.run._clock.budget = 0.0

    return watch


def test_a_run_stopped_inside_an_epoch_ends_as_one_left_alone(tmp_path, alone):
    for stop in (1, 4, 6):  # of nine steps, three an epoch
        watch = steps(stop)
        watch.run = run = tiny_run(tmp_path, resume=True, snapshot_seconds=math.inf)
        assert not run.train(watch=watch) and run.step == stop
    seconds, run = run.seconds, tiny_run(tmp_path, resume=True)
    assert run.step == 6 and run.seconds == seconds > 0 and run.train() and run.seconds > seconds
    assert_same(state_of(tmp_path), state_of(alone))
    finish(run)
    assert sha256_of(tmp_path / "model.safetensors") == sha256_of(alone / "model.safetensors")
    logs = [journal.read_log(folder) for folder in (tmp_path, alone)]
    for field in ("epoch", "lr", "train_loss", "test_top1_error"):
        assert [row[field] for row in logs[0]] == [row[field] for row in logs[1]]


def test_a_spent_budget_still_leaves_a_snapshot(tmp_path):
    assert not tiny_run(tmp_path, snapshot_seconds=math.inf).train(time_budget=0.0)
    assert [path.name for path in tmp_path.glob("snapshot-*")] == ["snapshot-00000000.safetensors"]


def test_a_budget_holds_the_last_snapshot_too(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.s, s=0.0)
    monkeypatch.setattr("tamzoo.clock.time", now)
    clock = Clock(100.0, snapshot_seconds=30.0)
    for now.s, due, spent in ((29.0, False, False), (30.0, True, False), (95.0, True, False)):
        assert (clock.snapshot_due(), clock.spent()) == (due, spent)
    clock.snapshot_ended(87.0)  # took eight seconds, as the last one would
    assert not clock.snapshot_due() and clock.spent()
    now.s = 92.0
    assert not clock.spent()


def test_the_seed_decides_everything(tmp_path, alone):
    tiny_run(tmp_path / "same").train()
    tiny_run(tmp_path / "other", seed=1).train()
    assert_same(state_of(tmp_path / "same"), state_of(alone))
    found, expected = state_of(tmp_path / "other"), state_of(alone)
    assert not torch.equal(found["model.conv1.weight"], expected["model.conv1.weight"])


def test_seeds_share_neither_order_nor_augmentation():
    longest = 300 * 391  # steps
    streams = [seed_of(seed, index, salt) for seed in range(3) for index in range(longest) for salt in (1, 2)]
    assert len(set(streams)) == len(streams)


def test_a_step_is_that_of_a_plain_loop(tmp_path):
    """Three steps against autograd, the rule of Nesterov's momentum and the recipe, written out."""
    recipe = replace(RECIPE, small_until=0.0, small_side=0, label_smoothing=0.2, weight_decay=0.1)
    learner = tiny_run(tmp_path, recipe=recipe).learner
    model, split = deepcopy(learner.model).train(), random_split(20, 0)
    velocities = [torch.zeros_like(value) for value in model.parameters()]
    learner.model.train()
    seen = []
    learner.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    for step in range(3):
        chosen, fraction = torch.arange(step, step + 8), step / 9
        loss = learner.learn(split, chosen, step, fraction)
        draws = draw(8, recipe, ENTRY.dataset, torch.Generator().manual_seed(seed_of(0, step, salt=2)))
        x = augment(split.pixels[chosen], draws, recipe, ENTRY.dataset)
        assert torch.equal(x, seen[-1])
        shares = model(x).log_softmax(1)
        right = shares.gather(1, split.labels[chosen, None]).squeeze(1)
        wanted = -(0.8 * right + 0.2 * shares.mean(1)).mean()
        torch.testing.assert_close(loss, wanted)
        gradients = torch.autograd.grad(wanted, list(model.parameters()))
        with torch.no_grad():
            for value, gradient, velocity in zip(model.parameters(), gradients, velocities, strict=True):
                gradient = gradient + recipe.weight_decay * value
                velocity.mul_(recipe.momentum).add_(gradient)
                value.sub_(recipe.lr_at(fraction) * (gradient + recipe.momentum * velocity))
        for name, value in learner.model.named_parameters():
            # float32: 2e-5 of rounding by the third step
            torch.testing.assert_close(value, model.get_parameter(name), atol=1e-4, rtol=0, msg=name)


def test_every_epoch_sees_every_image_once_and_in_another_order(tmp_path):
    run, seen, drawn = tiny_run(tmp_path), [], set()
    learn = run.learner.learn

    def look(split, chosen, step, fraction):
        seen.extend(chosen.tolist())
        drawn.add(run.learner._generator.initial_seed())
        return learn(split, chosen, step, fraction)

    run.learner.learn = look
    run.train()
    epochs = [tuple(seen[begin : begin + 20]) for begin in range(0, 60, 20)]
    assert all(sorted(order) == list(range(20)) for order in epochs)
    assert len({*epochs, tuple(range(20))}) == 4 and len(drawn) == 9


def test_the_recipe_says_until_when_images_are_small(tmp_path):
    run, sides = tiny_run(tmp_path), []
    run.learner.model.register_forward_pre_hook(
        lambda model, inputs: sides.append(inputs[0].shape[-1]) if model.training else None
    )
    run.train()
    assert sides == [24] * 5 + [32] * 4  # nine steps, half of them; the test images stay whole


def test_what_is_evaluated_is_the_stored_file(alone):
    record = read_record(alone / "record.json")
    assert record.sha256 == sha256_of(alone / "model.safetensors")
    stored = load_file(alone / "model.safetensors")
    assert {value.dtype for name, value in stored.items() if name.endswith("weight")} == {torch.float16}
    model = timm.create_model(ENTRY.name)
    load_weights(model, alone / "model.safetensors", ENTRY.name)
    assert evaluate(model.eval(), random_split(12, 1), ENTRY.dataset) == record.score
    assert (record.selection, record.epochs, record.n_train) == ("last epoch", 3, 20)
    # the weights are the average's
    assert torch.equal(stored["fc.weight"], state_of(alone)["ema.fc.weight"].half())
    assert stored["bn1.num_batches_tracked"] == 9  # which an average does not move


def test_a_run_begins_with_the_weights_of_another(tmp_path, alone):
    run = tiny_run(tmp_path / "second", seed=1, start=alone, recipe=replace(RECIPE, epochs=1))
    stored, live = load_file(alone / "model.safetensors"), run.learner.model.state_dict()
    for state in (live, run.learner.kept.state_dict()):
        assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in stored.items())
    assert run.train()
    finish(run)
    record = read_record(tmp_path / "second" / "record.json")
    assert record.start == read_record(alone / "record.json")
    assert [run.epochs for run in record.runs] == [3, 1]


@pytest.mark.parametrize("tag", ["svhn", "cifar100"])  # as many classes, and more
def test_the_head_of_another_data_set_is_left_out(tmp_path, alone, tag):
    entry = replace(ENTRY, dataset=DATASETS[tag])
    run = tiny_run(tmp_path, entry=entry, start=alone, seed=1)
    untrained = tiny_run(tmp_path / "untrained", entry=entry, seed=1).learner.model.state_dict()
    stored, live = load_file(alone / "model.safetensors"), run.learner.model.state_dict()
    for name, value in live.items():
        source = untrained if name in ("fc.weight", "fc.bias") else stored
        assert torch.equal(value, source[name].to(value.dtype)), name
    assert run.train()
    finish(run)
    assert read_record(tmp_path / "record.json").spans == [(ENTRY.name, 3), (entry.name, 3)]


def test_a_run_that_began_with_weights_ends_alike_when_stopped(tmp_path, alone):
    tiny_run(tmp_path / "whole", start=alone).train()
    watch = steps(4)
    watch.run = run = tiny_run(tmp_path / "stopped", start=alone, snapshot_seconds=math.inf)
    assert not run.train(watch=watch) and run.step == 4
    with pytest.raises(ValueError, match="another run \\(start: "):
        tiny_run(tmp_path / "stopped", resume=True)
    assert tiny_run(tmp_path / "stopped", start=alone, resume=True).train()
    assert_same(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))


def test_weights_to_begin_with_are_those_of_a_finished_run_of_the_entry(tmp_path, alone):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="expected a finished run with model.safetensors and record.json"):
        tiny_run(out, start=tmp_path)
    with pytest.raises(ValueError, match="expected a run of resnet20_tam with .*'group_size': 4"):
        tiny_run(out, start=alone, model_args={"group_size": 4})
    copy = shutil.copytree(alone, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="its SHA-256 is d9298a10d1b0..., its record says"):
        tiny_run(out, start=copy)
    assert not out.exists()


def test_the_average_follows_its_formula(tmp_path):
    run = tiny_run(tmp_path, snapshot_seconds=math.inf)
    live = run.learner.model.state_dict()
    names = [name for name, value in live.items() if value.is_floating_point()]
    expected = {name: live[name].double().clone() for name in names}

    def watch(moment) -> None:
        decay = min(RECIPE.ema_decay, moment.step / (moment.step + 9))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * live[name].double()

    run.train(watch=watch)
    found = run.learner.kept.state_dict()
    assert any("running_var" in name for name in names)
    for name in names:  # float32 against float64, nine steps
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-5, rtol=1e-5)


def test_without_an_average_the_model_itself_is_stored(tmp_path):
    run = tiny_run(tmp_path, recipe=replace(RECIPE, ema_decay=0.0, epochs=2))
    run.train()
    assert run.learner.kept is run.learner.model
    assert run.learner.model.get_buffer("bn1.num_batches_tracked") == 6  # after a test it trains on
    assert not any(name.startswith("ema.") for name in state_of(tmp_path))


def test_a_run_from_before_the_recipe_had_a_field_goes_on(tmp_path):
    recipe = replace(RECIPE, small_until=0.0, small_side=0)
    tiny_run(tmp_path, recipe=recipe).train(time_budget=0)
    path = tmp_path / "run.json"
    told = json.loads(path.read_text())
    del told["recipe"]["small_until"], told["recipe"]["small_side"]
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="holds another run \\(recipe's small_until: 0.0, not 0.5\\)"):
        tiny_run(tmp_path, resume=True)
    assert tiny_run(tmp_path, recipe=recipe, resume=True).train()


def test_a_run_goes_on_with_the_images_that_it_began_with(tmp_path):
    train, test = random_split(20, 0), random_split(12, 1)
    options = {"out": tmp_path, "precision": "float32"}
    Run(ENTRY, RECIPE, train, test, **options).train(time_budget=0)
    other = train.pixels.clone()
    other[3, 2, 1, 0] ^= 1
    for changed in (
        replace(train, pixels=train.pixels.flip(0), labels=train.labels.flip(0)),
        replace(train, pixels=other),
    ):
        with pytest.raises(ValueError, match=r"holds another run \(images: \d+, not \d+\); choose another"):
            Run(ENTRY, RECIPE, changed, test, **options, resume=True)
    path = tmp_path / "run.json"
    told = json.loads(path.read_text())
    del told["images"]  # as in early runs
    path.write_text(json.dumps(told))
    assert Run(ENTRY, RECIPE, train, test, **options, resume=True).train()
    assert "images" in json.loads(path.read_text())


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    tiny_run(tmp_path).train(time_budget=0)
    with pytest.raises(ValueError, match=r"holds a run of resnet20_tam.cifar10; pass --resume to go on, or"):
        tiny_run(tmp_path)
    for options, message in [
        ({"seed": 3}, "another run (seed: 0, not 3)"),
        ({"precision": "bfloat16"}, "another run (precision: float32, not bfloat16)"),
        ({"recipe": replace(RECIPE, lr=1.0)}, f"another run (recipe's lr: {RECIPE.lr}, not 1.0)"),
    ]:
        with pytest.raises(ValueError) as error:
            tiny_run(tmp_path, resume=True, **options)
        assert message in str(error.value)
    run = json.loads((tmp_path / "run.json").read_text())
    for damaged in ([], {}, run | {"recipe": None}, run | {"commits": 1}):
        (tmp_path / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="not the description of a run"):
            tiny_run(tmp_path, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds a run without its run.json; choose another --out"):
        tiny_run(tmp_path)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'half'"):
        tiny_run(tmp_path / "new", precision="half")
    for seed in (-1, 10**14):
        with pytest.raises(ValueError, match=rf"seed must be from 0 to 2147483647, got {seed}"):
            tiny_run(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a folder for the run, found a file"):
        tiny_run(tmp_path / "file")


def test_a_run_that_ended_is_not_overwritten(alone, tmp_path):
    for name in ("record.json", "log.csv", "model.safetensors"):  # as a row of the zoo has them
        shutil.copyfile(alone / name, tmp_path / name)
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a run without its run.json; choose another --out"):
            tiny_run(tmp_path, resume=resume)
    assert (tmp_path / "log.csv").read_bytes() == (alone / "log.csv").read_bytes()


def test_what_ran_is_told_when_each_session_starts(tmp_path, monkeypatch):
    machine = {"commit_here": "first", "versions": {"torch": "2", "timm": "1"}}
    for name, value in machine.items():
        monkeypatch.setattr(f"tamzoo.journal.{name}", lambda value=value: value)
    monkeypatch.setattr("tamzoo.train.hardware", lambda device, processes: "an H100")
    tiny_run(tmp_path).train(time_budget=0)
    assert json.loads((tmp_path / "run.json").read_text())["commits"] == ["first"]
    tiny_run(tmp_path, resume=True).train(time_budget=0)
    monkeypatch.setattr("tamzoo.journal.commit_here", lambda: "second")
    monkeypatch.setattr("tamzoo.journal.versions", lambda: {"torch": "3", "timm": "1"})
    monkeypatch.setattr("tamzoo.train.hardware", lambda device, processes: "an H200")
    run = tiny_run(tmp_path, resume=True, recipe=RECIPE)
    run.train()
    record = finish(run)
    assert (record.commit, record.hardware) == ("first, second", "an H100; an H200")
    assert record.versions == {"torch": "2, 3", "timm": "1"}


@pytest.mark.parametrize(("threads", "told"), [(1, "CPU, 1 of 3 cores ("), (3, "CPU, 3 cores (")])
def test_of_a_cpu_the_cores_that_trained_are_told(monkeypatch, threads, told):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert journal.hardware(torch.device("cpu"), 1).startswith(told)


def test_a_commit_with_changes_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "__file__", str(tmp_path / "tamzoo" / "journal.py"))
    monkeypatch.setenv("TAMZOO_COMMIT", "of a copy")
    assert journal.commit_here() == "of a copy"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    clean = journal.commit_here()
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert journal.commit_here() == f"{clean}-dirty"


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run stopped after five steps, with the snapshots of steps four and five."""
    watch = steps(5)
    watch.run = run = tiny_run(tmp_path)
    run.train(watch=watch)
    assert [path.name for path in sorted(tmp_path.glob("snapshot-*"))] == [
        "snapshot-00000004.safetensors",
        "snapshot-00000005.safetensors",
    ]
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def tell_another_step(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step":"5"', b'"step":"7"'))


def tell_no_step(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step":', b'"stop":'))


@pytest.mark.parametrize(
    "damage", [cut, flip_a_bit, tell_another_step, tell_no_step, lambda path: path.write_bytes(b"")]
)
def test_a_damaged_snapshot_falls_back_to_the_one_before(stopped, alone, damage, caplog):
    damage(stopped / "snapshot-00000005.safetensors")
    run = tiny_run(stopped, resume=True)
    assert run.step == 4
    assert "snapshot-00000005.safetensors: damaged" in caplog.text
    assert "falling back to the snapshot before" in caplog.text
    assert [path.name for path in stopped.glob("snapshot-*")] == ["snapshot-00000004.safetensors"]
    run.train()
    assert_same(state_of(stopped), state_of(alone))


def test_snapshots_of_another_model_are_refused(stopped):
    snapshots.save_snapshot(stopped, 6, state_of(stopped) | {"model.other": torch.zeros(1)}, {"seconds": "1"})
    with pytest.raises(ValueError, match="its snapshots are of another model; choose another --out"):
        tiny_run(stopped, resume=True)


def test_without_a_whole_snapshot_nothing_is_guessed(stopped):
    for path in stopped.glob("snapshot-*"):
        cut(path)
    with pytest.raises(ValueError, match="none of its 2 snapshots is whole; delete it to start again"):
        tiny_run(stopped, resume=True)


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are POSIX's")
def test_a_full_disk_keeps_the_snapshots_before(stopped, alone, caplog):
    before = {path.name: sha256_of(path) for path in stopped.glob("*snapshot-*")}
    run = tiny_run(stopped, resume=True)
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*snapshot-00000009"):
        run.train()
    assert run.step == 9  # training itself went on
    assert caplog.text.count("going on with the snapshot before") >= 3
    assert {path.name: sha256_of(path) for path in stopped.glob("*snapshot-*")} == before
    run = tiny_run(stopped, resume=True)
    assert run.step == 5 and run.train()
    assert_same(state_of(stopped), state_of(alone))


@pytest.mark.parametrize("full", [0, 2])
def test_an_epoch_that_cannot_be_written_is_written_later(tmp_path, monkeypatch, caplog, full):
    whole_file, calls = journal.whole_file, iter(range(9))

    def full_once(path):
        if next(calls) == full:
            raise OSError("no space left")
        return whole_file(path)

    monkeypatch.setattr(journal, "whole_file", full_once)
    assert tiny_run(tmp_path).train()
    assert "no space left; the epoch's line will be written later" in caplog.text
    assert [row["epoch"] for row in journal.read_log(tmp_path)] == [1, 2, 3]


def test_an_epoch_that_is_trained_again_has_one_line(tmp_path):
    watch = steps(1)
    watch.run = run = tiny_run(tmp_path, snapshot_seconds=math.inf)
    assert not run.train(watch=watch)

    def be_lost(row) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, resume=True, snapshot_seconds=math.inf).train(report=be_lost)
    run = tiny_run(tmp_path, resume=True)
    assert run.step == 1 and run.train()
    assert [row["epoch"] for row in journal.read_log(tmp_path)] == [1, 2, 3]


def test_one_process_at_a_time_trains_in_a_folder(stopped, monkeypatch):
    run, told = tiny_run(stopped, resume=True), json.loads((stopped / "run.json").read_text())
    monkeypatch.setattr("tamzoo.journal.commit_here", lambda: "of the other process")
    with run.journal.alone(), pytest.raises(ValueError, match="another process trains there"):
        tiny_run(stopped, resume=True).train()
    assert run.train()
    assert json.loads((stopped / "run.json").read_text()) == told  # of those that trained


def test_rate_and_time_left_are_not_those_of_the_first_step_which_compiles(tmp_path, monkeypatch):
    now, seen = 0.0, []
    monkeypatch.setattr("tamzoo.train.time", SimpleNamespace(monotonic=lambda: now))
    run = tiny_run(tmp_path)
    learn, save = run.learner.learn, run.save

    def compile_first(split, chosen, step, lr):
        nonlocal now
        now += 1 if step else 30
        return learn(split, chosen, step, lr)

    def save_slowly():
        nonlocal now
        now += 5
        save()

    run.learner.learn, run.save = compile_first, save_slowly
    run.train(watch=seen.append)
    rates = [row["images_per_s"] for row in journal.read_log(tmp_path)]
    assert rates == [12 / 2, 6.7, 6.7]  # three steps of 8, 8 and 4 images, snapshots left out
    assert [moment.eta_s for moment in seen[:3]] == [8 * 35, 7 * 6, 6 * 6]  # a snapshot before each step


def test_float32_is_not_rounded_to_tf32(tmp_path):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    tiny_run(tmp_path)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_loss_that_is_not_finite_stops_the_run(stopped):
    run = tiny_run(stopped, resume=True)
    learn = run.learner.learn

    def explode(split, chosen, step, lr):
        return learn(split, chosen, step, lr) * (float("nan") if step >= 6 else 1)

    run.learner.learn = explode
    with pytest.raises(
        ValueError, match=r"not finite from step 7 on \(epoch 3\).*good snapshot is .*06.safetensors"
    ):
        run.train()
    assert tiny_run(stopped, resume=True).step == 6


def test_weights_that_are_not_finite_are_not_kept(stopped):
    run = tiny_run(stopped, resume=True)
    with torch.no_grad():
        run.learner.model.get_parameter("fc.bias").fill_(float("inf"))
    with pytest.raises(ValueError, match=r"fc.bias is not finite at step 5; the last good snapshot is"):
        run.save()
    assert tiny_run(stopped, resume=True).step == 5


def test_snapshots_are_few_and_half_written_ones_go(stopped):
    for name in ("snapshot-00000007.safetensors", "model.safetensors", "log.csv"):
        with pytest.raises(KeyboardInterrupt), whole_file(stopped / name) as part:
            raise KeyboardInterrupt
        part.write_bytes(b"half")  # as a kill would leave it
    snapshots.keep_newest(stopped, 1)
    assert [path.name for path in stopped.glob("*snapshot-*")] == ["snapshot-00000005.safetensors"]
    assert [path.name for path in stopped.glob(".*")] == [".lock"]


class _NoWaiting(TorchDispatchMode):
    """Fails where an operation would make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal.default", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(tmp_path):
    run = tiny_run(tmp_path)
    run.train(time_budget=0.0)
    chosen = torch.arange(8)
    run.learner.model.train()
    with _NoWaiting():
        for step in range(2):
            run._losses[step] = run.learner.learn(run.train_split, chosen, step, 0.1)
            run.step += 1
            run._look(step, lambda moment: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_on_cuda_waits_for_the_device(tmp_path):
    device = torch.device("cuda")
    from tamzoo.train import Run

    splits = [random_split(n, n).to(device) for n in (40, 12)]
    run = Run(ENTRY, RECIPE, *splits, out=tmp_path, precision="bfloat16", compiled="no")
    run.train(time_budget=0.0)
    chosen = torch.arange(8, device=device)
    run.learner.learn(run.train_split, chosen, 0, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.learner.learn(run.train_split, chosen, 1, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_step_learns_the_same(tmp_path, monkeypatch):
    """The bookkeeping, with a capture that calls the function again; on CUDA the test below."""
    wanted = tiny_run(tmp_path / "called")
    wanted.train()
    captured = []

    def capture(function, inputs):
        output = torch.zeros(())
        captured.append(inputs[0].shape[2:])
        return lambda: output.copy_(function(*inputs)), output

    monkeypatch.setattr("tamzoo.replay.capture", capture)
    monkeypatch.setattr("tamzoo.replay._aside", lambda function, inputs: function(*inputs))
    monkeypatch.setattr("tamzoo.replay.WARM_UP", 1)
    run = tiny_run(tmp_path / "replayed", cuda_graph=True)
    run.train()
    assert captured == [(24, 24), (32, 32)]
    for name, tensor in run.learner.state().items():
        torch.testing.assert_close(tensor, wanted.learner.state()[name], rtol=1e-5, atol=1e-6)
    losses = [[row["train_loss"] for row in journal.read_log(each.out)] for each in (run, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_learner_that_replays_goes_when_its_last_user_does(monkeypatch):
    """With the memory of its captured steps, which the next run of a queue needs."""
    monkeypatch.setattr("tamzoo.replay.capture", lambda function, inputs: (lambda: None, function(*inputs)))
    monkeypatch.setattr("tamzoo.replay._aside", lambda function, inputs: function(*inputs))
    options = {"precision": "float32", "compiled": "no", "cuda_graph": True}
    learner, split = Learner(ENTRY, RECIPE, seed=0, world=CPU, **options), random_split(8, 0)
    for step in range(5):
        learner.learn(split, torch.arange(8), step, 0.9)
    left = weakref.ref(learner)
    gc.disable()
    try:
        del learner
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # of torch 2.11's Inductor
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("compiled", ["no", "model", "blocks"])
def test_gpu_replays_a_step_and_learns_the_same(compiled, joined):
    world, split = World(device=torch.device("cuda")), random_split(100, 0).to(torch.device("cuda"))
    recipe, states, losses = replace(RECIPE, small_until=0.0), [], []
    for cuda_graph in (False, True):
        options = {"compiled": compiled, "joined": joined, "cuda_graph": cuda_graph}
        learner = Learner(ENTRY, recipe, seed=0, precision="float32", world=world, **options)
        batches = torch.arange(56, device=world.device).split(8)  # three to warm up, a capture, three replays
        losses.append(
            [learner.learn(split, batch, step, step / 7).item() for step, batch in enumerate(batches)]
        )
        states.append(learner.state())
    # a step's rounding differs from run to run, and grows: of 1e-7, by a ReLU that turns, to 4e-3 in weights
    # and to 0.06 in the momentum of the first convolution's
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name, tensor in states[0].items():
        if not name.startswith("momentum."):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_compiled_by_blocks_a_run_learns_the_same(tmp_path, monkeypatch, ema_decay):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    recipe = replace(RECIPE, ema_decay=ema_decay)
    runs = [tiny_run(tmp_path / how, recipe=recipe, compiled=how) for how in ("no", "blocks")]
    for run in runs:
        run.train()
    kinds, sizes = 5, 2  # ResNet-20's blocks; neither evaluation nor smaller batches compile any
    assert counter.frame_count == kinds * sizes
    for name, tensor in runs[1].learner.state().items():
        torch.testing.assert_close(tensor, runs[0].learner.state()[name], rtol=1e-5, atol=1e-6)


def test_ends_that_cannot_be_joined_are_told_of(caplog):
    entry = ENTRIES["wrn10_4_tam.cifar10"]  # the shortcut's sum ends its blocks
    Learner(entry, RECIPE, seed=0, precision="float32", compiled="no", world=CPU, joined=True)
    assert caplog.messages == [
        "no block of wrn10_4_tam.cifar10 has an end that can be joined; it trains as it is"
    ]


def test_a_step_is_replayed_on_one_gpu_unless_asked_otherwise():
    one, two = World(device=torch.device("cuda")), World(device=torch.device("cuda"), size=2)
    assert how_on(CPU, None, None) == ("no", False)
    assert how_on(one, None, None) == ("blocks", True) and how_on(two, None, None) == ("model", False)
    assert how_on(one, None, False) == ("model", False) and how_on(one, "model", None) == ("model", True)


@pytest.mark.parametrize("order", [Order(cuda_graph=True), Order(joined=True)])
def test_what_makes_a_step_faster_on_cuda_needs_it(tmp_path, order):
    with pytest.raises(ValueError, match="needs one process on CUDA, found 1 on cpu"):
        train_entries({ENTRY.name: tmp_path}, order, None, 1.0, CPU, SILENT)


def test_a_watch_sees_where_the_run_is(tmp_path):
    seen, rows = [], []
    tiny_run(tmp_path).train(watch=seen.append, report=rows.append)
    assert [moment.step for moment in seen] == list(range(1, 10))
    assert [moment.epoch for moment in seen] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(moment.images_per_s > 0 and moment.eta_s >= 0 and moment.steps == 9 for moment in seen)
    assert seen[-1].eta_s == 0
    assert journal.read_log(tmp_path) == rows
    # 8, 8 and 4 images a step
    mean = sum(moment.loss * n for moment, n in zip(seen[:3], (8, 8, 4), strict=True)) / 20
    assert rows[0]["train_loss"] == pytest.approx(mean, rel=1e-6)


def test_bfloat16_trains_on_a_cpu(tmp_path):
    run = tiny_run(tmp_path, recipe=replace(RECIPE, epochs=1), precision="bfloat16")
    seen, kinds = [], set()
    run.learner.model.layer1.register_forward_hook(lambda layer, given, x: kinds.add(x.dtype))
    run.train(watch=lambda moment: seen.append(moment.loss))
    assert all(math.isfinite(loss) for loss in seen) and kinds == {torch.bfloat16}
    assert run.learner.learn(run.train_split, torch.arange(8), 0, 0.0).dtype is torch.float32
    assert {p.dtype for p in run.learner.model.parameters()} == {torch.float32}


def kill(tmp_path: Path, kills: int) -> str:
    script = Path(__file__).with_name("kill_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_one_left_alone(tmp_path, kills):
    told = kill(tmp_path, kills)
    print(told)
    assert told.count("\nkill ") == kills
    assert "ended with the same weights and state" in told


def test_the_queue_has_the_stated_order(tmp_path):
    assert QUEUE[:4] == (
        "resnet18_tam.cifar10",
        "resnet18_tam.cifar100",
        "resnet50_tam.cifar100",
        "resnet50_tam.cifar10",
    )
    assert QUEUE[10] == "resnet18_plain.cifar10" and QUEUE[20] == "resnet18_se.cifar10"
    assert sorted(QUEUE) == sorted(ENTRIES)  # all of them, once
    records = {name: record_of(ENTRIES[name]) for name in QUEUE}  # some of what has no weights
    left = [name for name in QUEUE if (record := records[name]) is None or record.recipe["name"] != "short"]
    assert "resnet50_plain.cifar100" not in left and "resnet18_plain.cifar10" in left
    found, tam = waiting(tmp_path), [name for name in left if name in QUEUE[:10]]
    bare = [
        name for name in tam if ENTRIES[name].trained is None
    ]  # first, then those that another recipe has
    assert found[: len(tam)] == [*bare, *(name for name in tam if name not in bare)]
    assert found[len(tam)] == "resnet18_plain.cifar10" and sorted(found) == sorted(left)
    left = found
    (tmp_path / left[0]).mkdir()
    record, entry = tmp_path / left[0] / "record.json", ENTRIES[left[0]]
    for other in (a_record(entry, recipe="short-cpu"), a_record(ENTRIES[left[1]])):
        record.write_text(other.to_json())
        assert waiting(tmp_path) == left
    record.write_text(a_record(entry).to_json())
    assert waiting(tmp_path) == left[1:]
    assert waiting(tmp_path, only="*_se.*") == [name for name in left[1:] if "_se." in name]
    assert train_entries({}, Order(), tmp_path, math.inf, CPU, SILENT)
    with pytest.raises(ValueError, match="no entry is called 'vgg"):
        waiting(tmp_path, only="vgg*")


def test_weights_of_another_recipe_do_not_leave_the_queue(tmp_path, monkeypatch):
    names = "wrn10_4_tam.cifar10", "resnet18_tam.svhn"
    for name, recipe in zip(names, ("short-cpu", "short-svhn"), strict=True):
        trained = Trained(sha256="0" * 64, recipe=recipe)
        monkeypatch.setitem(ENTRIES, name, replace(ENTRIES[name], trained=trained))
    assert names[0] in waiting(tmp_path) and names[0] not in waiting(tmp_path, "short-cpu")
    assert names[1] not in waiting(tmp_path) and names[1] in waiting(tmp_path, "paper")
    with pytest.raises(ValueError, match="no recipe 'shrot'"):
        waiting(tmp_path, "shrot")


@pytest.fixture
def small_data(tmp_path, monkeypatch) -> Path:
    sizes = {"train": 20, "test": 12}
    monkeypatch.setattr("tamzoo.session.load_split", lambda *args: random_split(sizes[args[2]], 0))
    return tmp_path


@pytest.mark.parametrize(("resume", "how"), [(True, ""), (False, " with --resume")])
def test_a_session_that_stops_says_how_it_goes_on(small_data, monkeypatch, resume, how):
    monkeypatch.setattr(Run, "train", lambda *args: False)
    said, order = [], Order(epochs=1, resume=resume)
    folders = {ENTRY.name: small_data / "run"}
    assert not train_entries(folders, order, small_data, math.inf, CPU, Voice(say=said.append))
    assert said[-1] == f"{ENTRY.name}: stopped after step 0 of 1; the same command{how} goes on"


def test_a_session_goes_on_where_the_last_one_stopped(small_data):
    names = ["resnet20_tam.cifar10", "wrn10_4_tam.cifar10"]
    folders = {name: small_data / name for name in names}
    order = Order(recipe="short", epochs=1, resume=True)
    said = []
    voice = Voice(say=said.append)
    assert not train_entries(folders, order, small_data, 0.0, CPU, voice)
    assert said == [f"the time is up; the same command goes on with {names[0]}"]
    said.clear()
    assert train_entries({names[0]: folders[names[0]]}, order, small_data, math.inf, CPU, voice)
    assert "resnet20_tam.cifar10: 1 epochs of recipe short, float32 on cpu, from step 0 of 1" in said
    assert "weights in" in said[-1]
    said.clear()
    assert train_entries(folders, order, small_data, math.inf, CPU, voice)
    assert said[0].startswith("resnet20_tam.cifar10: done, top-1 error")
    assert said[1].startswith("wrn10_4_tam.cifar10: 1 epochs")
    with pytest.raises(ValueError, match="pass --resume"):
        train_entries({names[0]: folders[names[0]]}, replace(order, resume=False), small_data, 9, CPU, SILENT)
    with pytest.raises(ValueError, match=r"no entry .resnet20_tamm.cifar10.; nearest: resnet20_tam.cifar10"):
        train_entries({"resnet20_tamm.cifar10": small_data}, order, small_data, 9, CPU, SILENT)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed: 0, not 1"),
        ({"epochs": 2}, "recipe's epochs: 1, not 2"),
        ({"recipe": "paper"}, "recipe's name: short, not paper"),
        ({}, "entry: resnet20_tam.cifar10, not resnet20_se.cifar10"),
    ],
)
def test_a_finished_run_of_another_order_is_not_called_done(small_data, change, told):
    name, order = "resnet20_tam.cifar10", Order(recipe="short", epochs=1, resume=True)
    assert train_entries({name: small_data / "out"}, order, small_data, math.inf, CPU, SILENT)
    other = name if change else "resnet20_se.cifar10"
    with pytest.raises(ValueError, match=rf"out holds another run \({told}\); choose another --out"):
        train_entries({other: small_data / "out"}, replace(order, **change), small_data, 9, CPU, SILENT)


def test_a_failing_entry_does_not_stop_the_queue(small_data):
    names = ["resnet20_tam.cifar10", "wrn10_4_tam.cifar10"]
    folders, said = {name: small_data / name for name in names}, []
    folders[names[0]].mkdir()
    (folders[names[0]] / "run.json").write_text("[]")
    order = Order(recipe="short", epochs=1, resume=True)
    with pytest.raises(ValueError, match=f"1 of 2 entries failed, for the reasons above: {names[0]}"):
        train_entries(folders, order, small_data, math.inf, CPU, Voice(say=said.append))
    assert "not the description of a run" in said[0] and "weights in" in said[-1]
    assert (folders[names[1]] / "record.json").is_file()


def test_a_queue_that_runs_out_of_time_still_tells_what_failed(small_data, monkeypatch):
    names = ["resnet20_tam.cifar10", "wrn10_4_tam.cifar10"]
    folders, said = {name: small_data / name for name in names}, []
    folders[names[0]].mkdir()
    (folders[names[0]] / "run.json").write_text("[]")
    monkeypatch.setattr(Run, "train", lambda *args: False)
    with pytest.raises(ValueError, match=f"1 of 2 entries failed, for the reasons above: {names[0]}"):
        train_entries(folders, Order(epochs=1), small_data, math.inf, CPU, Voice(say=said.append))
    assert "stopped after step 0 of 1" in said[-1]


def test_a_queue_holds_no_run_that_has_ended(small_data, monkeypatch):
    train, learners = Run.train, []

    def look(run, *args):
        gc.collect()
        assert not any(learner() for learner in learners)
        learners.append(weakref.ref(run.learner))
        return train(run, *args)

    monkeypatch.setattr(Run, "train", look)
    folders = {name: small_data / name for name in ("resnet20_tam.cifar10", "wrn10_4_tam.cifar10")}
    assert train_entries(folders, Order(epochs=1), small_data, math.inf, CPU, SILENT)
    assert len(learners) == 2


def test_a_compilers_error_stops_one_entry_and_not_the_queue(small_data, monkeypatch, caplog):
    """Triton's are no RuntimeError."""

    def fail(run, *_):
        raise AssertionError("out of registers")

    monkeypatch.setattr("tamzoo.train.Run.train", fail)
    folders, said = {name: small_data / name for name in ("resnet20_tam.cifar10", "wrn10_4_tam.cifar10")}, []
    with pytest.raises(ValueError, match="2 of 2 entries failed"):
        train_entries(folders, Order(epochs=1), small_data, math.inf, CPU, Voice(say=said.append))
    assert said[-1] == "wrn10_4_tam.cifar10: failed: out of registers"
    assert "in fail" in caplog.text  # where it happened


def test_a_damaged_log_is_told_before_there_is_any_work(stopped):
    (stopped / "log.csv").write_text("epoch,lr\n1,x\n")
    with pytest.raises(ValueError, match="log.csv"):
        tiny_run(stopped, resume=True)


def test_a_failing_device_stops_the_queue(small_data, monkeypatch):
    def fail(run, *_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("tamzoo.train.Run.train", fail)
    names, said = ["resnet20_tam.cifar10", "wrn10_4_tam.cifar10"], []
    folders = {name: small_data / name for name in names}
    order = Order(epochs=1, resume=True)
    with pytest.raises(ValueError, match="2 of 2 entries failed"):  # as after a capture: it still computes
        train_entries(folders, order, small_data, math.inf, CPU, SILENT)
    shutil.rmtree(folders[names[1]])
    monkeypatch.setattr("tamzoo.session._computes", lambda device: False)
    with pytest.raises(RuntimeError, match=f"^{names[0]}: CUDA error: an illegal memory access"):
        train_entries(folders, order, small_data, math.inf, CPU, Voice(say=said.append))
    assert not folders[names[1]].exists() and len(said) == 1


def test_the_queue_leaves_alone_what_another_process_trains(small_data):
    folders, said = {name: small_data / name for name in ("resnet20_tam.cifar10", "wrn10_4_tam.cifar10")}, []
    folders[ENTRY.name].mkdir()
    order, voice = Order(epochs=1, resume=True), Voice(say=said.append)
    with FileLock(folders[ENTRY.name] / ".lock"):
        assert not train_entries(folders, order, small_data, math.inf, CPU, voice)
    assert "another process trains there" in said[1] and "weights in" in said[-1]
    assert train_entries(folders, order, small_data, math.inf, CPU, voice)


def test_a_run_is_finished_before_another_process_may_train_in_its_folder(small_data, monkeypatch):
    def look(run, progress):
        with pytest.raises(Timeout):
            FileLock(run.out / ".lock").acquire(timeout=0)
        return finish(run, progress)

    monkeypatch.setattr("tamzoo.session.finish", look)
    assert train_entries({ENTRY.name: small_data / "run"}, Order(epochs=1), small_data, 99, CPU, SILENT)


def test_no_entry_begins_that_would_do_no_step_in_time(small_data, monkeypatch):
    now, train = 0.0, Run.train
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("tamzoo.session.time", clock)

    def slow(run, *args):
        nonlocal now
        now += 40
        done = train(run, *args)
        assert run.ready_s > 0
        run.ready_s = 30
        return done

    monkeypatch.setattr(Run, "train", slow)
    folders, said = {name: small_data / name for name in ("resnet20_tam.cifar10", "wrn10_4_tam.cifar10")}, []
    order, voice = Order(epochs=1, resume=True), Voice(say=said.append)
    assert not train_entries(folders, order, small_data, 69, CPU, voice)
    assert said[-1] == "the time is up; the same command goes on with wrn10_4_tam.cifar10"
    assert not folders["wrn10_4_tam.cifar10"].exists()
    shutil.rmtree(folders[ENTRY.name])
    now = 0.0
    assert train_entries(folders, order, small_data, 71, CPU, voice)


def test_the_command_trains_and_draws(small_data, monkeypatch):
    from typer.testing import CliRunner

    from tamzoo.cli import app

    waits = replace(ENTRIES["resnet20_tam.cifar10"], trained=None)
    monkeypatch.setitem(ENTRIES, waits.name, waits)
    out = small_data / "run"
    options = ["--data", str(small_data), "--out", str(out), "--epochs", "2"]
    command = ["train", "resnet20_tam.cifar10", "--recipe", "short-cpu", *options]
    found = CliRunner().invoke(app, [*command, "--time-budget", "0"])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, [*command, "--resume"])
    assert found.exit_code == 0 and "epoch 2/2: loss" in found.output, found.output
    picture = small_data / "error.png"
    found = CliRunner().invoke(app, ["plot", str(out), "-o", str(picture)])
    assert found.exit_code == 0 and picture.read_bytes().startswith(b"\x89PNG"), found.output
    found = CliRunner().invoke(app, ["train", "--queue", "--only", "resnet20*", *options])
    assert found.exit_code == 0 and (out / "resnet20_tam.cifar10" / "record.json").exists(), found.output
    found = CliRunner().invoke(app, ["train", "--out", str(out)])
    assert found.exit_code != 0


def test_the_commands_options_reach_the_run(small_data, alone):
    from typer.testing import CliRunner

    from tamzoo.cli import app

    out = small_data / "run"
    options = ["--seed", "3", "--precision", "bfloat16", "--initial-checkpoint", str(alone)]
    places = ["--data", str(small_data), "--out", str(out), "--epochs", "1"]
    found = CliRunner().invoke(app, ["train", ENTRY.name, "--recipe", "restart-cpu", *places, *options])
    assert found.exit_code == 0, found.output
    record = read_record(out / "record.json")
    assert (record.seed, record.precision, record.epochs) == (3, "bfloat16", 1)
    assert record.recipe["name"] == "restart-cpu" and record.start == read_record(alone / "record.json")
    assert all(gate.proven_min is not None for gate in record.gates)


def test_tensorboard_gets_every_epoch_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_run(tmp_path, recipe=replace(RECIPE, epochs=2)).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_top1_error")] == [1, 2]


def test_messages_go_through_logging(stopped, caplog):
    cut(stopped / "snapshot-00000005.safetensors")
    with caplog.at_level(logging.WARNING, "tamzoo"):
        tiny_run(stopped, resume=True)
    assert [record.name for record in caplog.records] == ["tamzoo.snapshots"]
