"""Publishing to a loopback Hub, also while things go wrong: nothing lost, nothing half-published."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Event

import pytest
import torch
from huggingface_hub import HfApi
from typer.testing import CliRunner

from tamzoo import hub
from tamzoo.catalogue import ENTRIES
from tamzoo.cli import app
from tamzoo.publish import TAG, collect, publish
from tamzoo.staging import Staged, stage
from tamzoo.verify import verify_remote
from tests.hub_server import Hub, patient_client
from tests.standins import stand_in
from tests.tiny_runs import random_split

# huggingface_hub's own upload raises it inside httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "resnet20_tam.cifar10"
REPO = f"tamzoo/{NAME}"
FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "record.json",
    "log.csv",
    "gates.png",
    "onnx/model.onnx",
    ".eval_results/cifar10.yaml",
}
ALWAYS = {"times": -1}


def fake_export(model: torch.nn.Module, path: Path, weights_sha256: str) -> None:
    path.write_bytes(b"onnx" * 100)


@pytest.fixture
def api(server):
    return HfApi(endpoint=server.url, token="hf_writer")


@pytest.fixture(scope="module")
def staged_once(tmp_path_factory) -> Staged:
    folder = tmp_path_factory.mktemp("staged")
    cards = tmp_path_factory.mktemp("cards")
    return stage(stand_in(cards), cards / NAME, folder, export=fake_export)


@pytest.fixture
def staged(staged_once, tmp_path) -> Staged:
    shutil.copytree(staged_once.folder, tmp_path / "staged")
    return replace(staged_once, folder=tmp_path / "staged")


def published_whole(server: Hub, staged: Staged) -> bool:
    files = server.store.files(REPO)
    return set(files) - {".gitattributes"} == FILES and all(
        server.store.content(REPO, path) == file.read_bytes() for path, file in staged.files.items()
    )


def test_a_repository_is_the_staged_folder_byte_for_byte(server, api, staged, tmp_path):
    done = publish(staged, api)
    assert set(done.uploaded) == FILES == set(staged.files)
    assert published_whole(server, staged)
    assert [commit["title"] for _, commit in server.store.history(REPO)] == [
        f"Publish {NAME} {TAG}",
        "initial commit",
    ]
    assert server.store.resolve(REPO, TAG) == server.store.resolve(REPO, "main")
    assert verify_remote(staged.entry, api, cache_dir=tmp_path / "cache") == []
    assert collect([REPO], api).startswith(f"{server.url}/collections/tamzoo/tree-structured")


def test_a_second_run_changes_nothing(server, api, staged):
    publish(staged, api)
    collect([REPO], api)
    server.log.clear()
    done = publish(staged, api)
    collect([REPO], api)
    assert (done.uploaded, done.deleted, done.tag) == ([], [], None)
    assert server.writes() == []


def test_a_changed_card_uploads_only_the_card_and_moves_no_tag(server, api, staged):
    publish(staged, api)
    tagged = server.store.resolve(REPO, TAG)
    (staged.folder / "README.md").write_text((staged.folder / "README.md").read_text() + "\nMore.\n")
    server.log.clear()
    done = publish(staged, api)
    assert done.uploaded == ["README.md"] and published_whole(server, staged)
    assert [path for _, path in server.writes()] == [f"/api/models/{REPO}/commit/main"]
    assert server.store.resolve(REPO, TAG) == tagged != server.store.resolve(REPO, "main")


def test_a_file_that_is_no_longer_staged_is_deleted(server, api, staged):
    publish(staged, api)
    server.store.push(REPO, "main", "stray", {"old.txt": b"old"})
    assert publish(staged, api).deleted == ["old.txt"]
    assert published_whole(server, staged)


def test_a_dry_run_tells_and_writes_nothing(server, api, staged):
    done = publish(staged, HfApi(endpoint=server.url, token=False), dry_run=True)
    assert set(done.uploaded) == FILES and done.tag == TAG
    assert server.writes() == [] and server.store.repos() == []


def test_a_pull_request_is_finished_after_its_merge(server, api, staged):
    publish(staged, api)
    (staged.folder / "log.csv").write_text("epoch,lr\n1,0.2\n")
    server.tokens = server.tokens | {"hf_guest": {"name": "guest", "orgs": [], "role": "write"}}
    guest = HfApi(endpoint=server.url, token="hf_guest")
    done = publish(staged, guest, create_pr=True)
    assert done.pull_request == f"{server.url}/{REPO}/discussions/1" and done.tag is None
    assert not published_whole(server, staged)
    api.merge_pull_request(REPO, 1)
    assert publish(staged, api).uploaded == [] and published_whole(server, staged)


def test_a_private_repository_and_its_collection_stay_private(server, api, staged):
    publish(staged, api, private=True)
    collect([REPO], api, private=True)
    assert server.store.load(REPO)["private"] and server.store.collections()[0]["private"]


def test_another_owner_gets_cards_of_its_own(server, tmp_path):
    entry = stand_in(tmp_path / "cards")
    (tmp_path / "mine").mkdir()
    staged = stage(entry, tmp_path / "cards" / NAME, tmp_path / "mine", owner="writer", export=fake_export)
    publish(staged, HfApi(endpoint=server.url, token="hf_writer"))
    assert f"hf-hub:writer/{NAME}" in server.store.content(f"writer/{NAME}", "README.md").decode()
    api = HfApi(endpoint=server.url, token="hf_writer")
    assert verify_remote(entry, api, owner="writer", cache_dir=tmp_path / "cache") == []


# Faults

RIDDEN_OUT = {
    "the upload's list is answered 503": {"path": "/preupload/", "status": 503},
    "the storage's list is answered 502": {"path": "/objects/batch", "status": 502},
    "the upload is answered 500": {"method": "PUT", "path": "/cdn/", "status": 500},
    "the connection drops during the upload": {"method": "PUT", "path": "/cdn/", "refuse_effect": True},
    "the answer to the upload is lost": {"method": "PUT", "path": "/cdn/", "drop": -1},
    "the upload's check is answered 429": {"path": "/lfs/verify", "status": 429},
    "the answers are slow": {"path": "/commit/", "delay": 0.2},
    "another run makes the tag first": {
        "path": "/tag/",
        "before": lambda server: server.store.set_ref(
            REPO, f"refs/tags/{TAG}", server.store.resolve(REPO, "main")
        ),
    },
    "another run creates the repository first": {
        "path": "/repos/create",
        "before": lambda server: server.store.create(REPO),
    },
}


@patient_client
@pytest.mark.parametrize("fault", RIDDEN_OUT)
def test_the_publisher_notices_nothing_when(fault, server, api, staged):
    injected = server.fault(**RIDDEN_OUT[fault])
    publish(staged, api)
    assert injected.seen and published_whole(server, staged)
    assert server.store.resolve(REPO, TAG) == server.store.resolve(REPO, "main")


def push_between(server: Hub) -> None:
    server.store.push(REPO, "main", "someone else's", {"theirs.txt": b"theirs"})


TOLD = {
    "the Hub is down": (
        {"path": "/api/", "status": 503, **ALWAYS},
        "error of its own (503); try again later",
    ),
    "creating is answered 500": ({"path": "/repos/create", "status": 500}, "error of its own (500)"),
    "the first answer is lost": ({"path": "/whoami", "drop": -1}, "cannot be reached (RemoteProtocolError)"),
    "creating is not answered": (
        {"path": "/repos/create", "drop": -1},
        "cannot be reached (RemoteProtocolError)",
    ),
    "the quota is used up": (
        {"path": "/objects/batch", "status": 403, "message": "Private repository storage limit reached"},
        "Private repository storage limit reached",
    ),
    "the storage is down": (
        {"method": "PUT", "path": "/cdn/", "status": 500, **ALWAYS},
        "error of its own (500); try again later",
    ),
    "every upload is cut off": (
        {"method": "PUT", "path": "/cdn/", "refuse_effect": True, **ALWAYS},
        "cannot be reached (RemoteProtocolError)",
    ),
    "the upload arrives damaged": (
        {"path": "/lfs/verify", "status": 400, "message": "wrong size"},
        "wrong size",
    ),
    "the card is refused": (
        {"path": "/validate-yaml", "status": 400, "message": "bad"},
        "Invalid metadata in README",
    ),
    "the commit is cut off before it counts": (
        {"path": "/commit/", "refuse_effect": True},
        "cannot be reached",
    ),
    "the commit counts but its answer is lost": ({"path": "/commit/", "drop": -1}, "cannot be reached"),
    "the commit is answered 500": ({"path": "/commit/", "status": 500}, "error of its own (500)"),
    "the commit is answered 429": ({"path": "/commit/", "status": 429}, "fewer requests (429)"),
    "someone pushes in between": (
        {"path": "/commit/", "before": push_between},
        "someone else has pushed to tamzoo/resnet20_tam.cifar10 meanwhile; run the command again",
    ),
    "the tag is answered 500": ({"path": "/tag/", "status": 500}, "error of its own (500)"),
    "the token expires on the way": (
        {"path": "/commit/", "status": 401, "message": "Invalid credentials in Authorization header"},
        "the Hub refuses the token; log in again",
    ),
    "the repository is deleted on the way": (
        {"path": "/preupload/", "before": lambda server: server.store.delete(REPO)},
        "there is no repository",
    ),
}


@pytest.mark.parametrize("fault", TOLD)
def test_the_publisher_is_told_and_the_next_run_finishes_when(fault, server, api, staged):
    injected, sentence = TOLD[fault]
    seen = server.fault(**injected)
    with pytest.raises(
        RuntimeError, match=rf"^{re.escape(NAME)}: .*{re.escape(sentence)}.*publish again"
    ) as told:
        publish(staged, api)
    assert seen.seen and "\n" not in str(told.value) and "hf_" not in str(told.value).replace("hf auth", "")
    if server.store.repos():  # whatever happened, the repository is as before or whole
        present = set(server.store.files(REPO)) - {".gitattributes", "theirs.txt"}
        assert present in (set(), FILES)
    server.faults.clear()
    publish(staged, api)
    assert published_whole(server, staged)
    assert server.store.resolve(REPO, TAG) == server.store.resolve(REPO, "main")


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_wrong", "the Hub refuses the token; log in again with `hf auth login` or correct HF_TOKEN"),
        ("hf_reader", "the token of reader may only read; log in with `hf auth login`"),
        (None, "no token was found; log in with `hf auth login` or set HF_TOKEN"),
    ],
)
def test_a_token_that_may_not_publish_is_told_before_anything_is_written(token, sentence, server, staged):
    with pytest.raises(RuntimeError, match=re.escape(sentence)) as told:
        publish(staged, HfApi(endpoint=server.url, token=token))
    assert "hf_" not in str(told.value)
    assert server.writes() == [] and server.store.repos() == []


def test_the_catalogue_asks_for_the_version_that_is_published():
    assert {entry.trained.revision for entry in ENTRIES.values() if entry.trained} == {TAG}
    assert f"v{version('tamzoo')}" == TAG


def test_an_owner_that_is_not_ones_own_is_told(server, api, staged):
    with pytest.raises(
        RuntimeError, match="writer may not write to other; choose --owner from writer, tamzoo"
    ):
        publish(replace(staged, owner="other"), api)


def test_other_weights_under_a_tagged_version_are_refused(server, api, staged, tmp_path):
    publish(staged, api)
    server.log.clear()
    entry = stand_in(tmp_path / "other", seed=1)
    (tmp_path / "again").mkdir()
    again = stage(entry, tmp_path / "other" / NAME, tmp_path / "again", export=fake_export)
    with pytest.raises(
        RuntimeError, match=f"{TAG} of {REPO} is tagged with other weights; raise tamzoo's version"
    ):
        publish(again, api)
    assert server.writes() == [] and published_whole(server, staged)


def test_a_collection_that_fails_is_finished_by_the_next_run(server, api, staged):
    publish(staged, api)
    for fault in ({"path": "/collections$", "status": 500}, {"path": "/items", "status": 503}):
        server.fault(method="POST", **fault)
        with pytest.raises(RuntimeError, match=r"^the collection: the Hub answers with an error of its own"):
            collect([REPO], api)
    collect([REPO], api)
    assert [item["id"] for item in server.store.collections()[0]["items"]] == [REPO]


KILLED = """
import sys
from pathlib import Path
from tamzoo.publish import publish
from tamzoo.staging import Staged
from tests.standins import stand_in
from tests.tiny_runs import random_split
from huggingface_hub import HfApi
entry = stand_in(Path(sys.argv[2]))
publish(Staged(entry=entry, folder=Path(sys.argv[1]), owner="tamzoo"), HfApi())
"""


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(server, api, staged, tmp_path):
    uploading = Event()
    server.fault(
        method="POST", path="/commit/", before=lambda hub: uploading.set(), delay=60, refuse_effect=True
    )
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_writer",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", KILLED, str(staged.folder), str(tmp_path / "cards")]
    with (tmp_path / "told").open("w") as told:
        run = subprocess.Popen(command, env=environment, stderr=told)
    assert uploading.wait(300), (tmp_path / "told").read_text()
    run.kill()
    run.wait()
    server.stopping.set()  # ends the delay
    assert set(server.store.files(REPO)) == {".gitattributes"}
    server.log.clear()
    publish(staged, api)
    assert published_whole(server, staged)
    assert not [path for method, path, _ in server.log if method == "PUT"], "the blobs were there already"


# Verifying


def test_a_damaged_repository_is_found_out(server, api, staged, tmp_path):
    publish(staged, api)
    server.store.push(REPO, "main", "worse", {"README.md": b"# Other"}, ["onnx/"])
    problems = verify_remote(staged.entry, api, cache_dir=tmp_path / "cache")
    assert problems == [
        "onnx/model.onnx is missing",
        "README.md is not what the catalogue and the record render to",
    ]
    server.fault(path="/api/models/", status=503, **ALWAYS)
    (told,) = verify_remote(staged.entry, api, cache_dir=tmp_path / "elsewhere")
    assert "try again" in told


def test_the_head_is_verified_and_the_weights_at_the_revision(server, api, staged, tmp_path):
    entry = staged.entry
    (told,) = verify_remote(entry, api, cache_dir=tmp_path / "cache")
    assert "there is no repository" in told
    publish(staged, api)
    other, _ = server.store.push(REPO, "main", "worse", {"README.md": b"# Other"})
    (told,) = verify_remote(entry, api, cache_dir=tmp_path / "cache")
    assert told == "README.md is not what the catalogue and the record render to"
    publish(staged, api)
    server.store.set_ref(REPO, f"refs/tags/{TAG}", other, replace=True)  # as a tag with an older card
    assert verify_remote(entry, api, cache_dir=tmp_path / "cache") == []
    other, _ = server.store.push(REPO, "main", "worse", {"model.safetensors": b"others"})
    publish(staged, api)
    server.store.set_ref(REPO, f"refs/tags/{TAG}", other, replace=True)
    assert verify_remote(entry, api, cache_dir=tmp_path / "cache") == [
        f"model.safetensors at {TAG} is not the head's"
    ]


def test_a_download_that_arrives_damaged_is_found_out(server, api, staged, tmp_path):
    publish(staged, api)
    server.fault(method="GET", path="/resolve/.*/log.csv", corrupt=True)
    assert verify_remote(staged.entry, api, cache_dir=tmp_path / "cache") == [
        "log.csv differs from what the Hub lists"
    ]


# The commands


@pytest.fixture
def command(server, tmp_path, monkeypatch):
    """Runs a command as a user of the loopback Hub who has a clone with one trained entry."""
    entry = stand_in(tmp_path / "cards")
    monkeypatch.setattr(hub, "CARDS", tmp_path / "cards")
    monkeypatch.setitem(ENTRIES, NAME, entry)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.delenv("TAMZOO_DATA", raising=False)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_the_commands_publish_and_verify(command, server):
    told = command("publish", NAME, "--dry-run").output
    assert "would be uploaded: .eval_results/cifar10.yaml, README.md" in told and not server.store.repos()
    told = command("publish", NAME)
    assert told.exit_code == 0 and f"{server.url}/{REPO}: uploaded: " in told.output
    assert "collection: " in told.output and "hf_" not in told.output
    assert f"{server.url}/{REPO}: nothing to upload" in command("publish", NAME).output
    told = command("verify", NAME)
    assert told.exit_code == 0 and told.stdout == f"{NAME}: here: right\n{NAME}: {REPO}: right\n"
    server.store.push(REPO, "main", "worse", {"log.csv": b""})
    told = command("verify", NAME)
    assert told.exit_code == 0, "a log is no rendering; only its presence is checked"
    server.store.push(REPO, "main", "worse", {"README.md": b""})
    told = command("verify", NAME)
    assert told.exit_code == 1 and "README.md is not what" in told.output


def test_the_commands_options_reach_the_hub(command, server):
    told = command("publish", NAME, "--private", "--owner", "writer")
    assert told.exit_code == 0, told.output
    assert list(server.store.repos()) == [f"writer/{NAME}"]
    assert server.store.load(f"writer/{NAME}")["private"] and server.store.collections()[0]["private"]
    told = command("publish", NAME, "--create-pr")
    assert told.exit_code == 0 and "collection" not in told.output, told.output
    refs = server.store.load(REPO)["refs"]
    assert "refs/pr/1" in refs and set(server.store.files(REPO)) == {".gitattributes"}


def test_what_errs_otherwise_than_its_record_says_is_not_published(command, server, tmp_path, monkeypatch):
    monkeypatch.setattr("tamzoo.data.load_split", lambda *where: random_split(40, 0))
    told = command("publish", NAME, "--data", str(tmp_path))
    assert "of 40 test images, the record says 5.2 %; evaluate them again" in str(told.exception)
    assert not server.store.repos()


@pytest.mark.parametrize("words", [(), (NAME, "--all"), ("resnet18_tam.svhm",), ("resnet152_tam.cifar10",)])
def test_the_commands_refuse_what_is_no_entry(command, words):
    for name in ("publish", "verify"):
        assert isinstance(command(name, *words).exception, ValueError)
