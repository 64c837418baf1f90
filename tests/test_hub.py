"""Fetching weights: from the clone, the cache and a loopback Hub on which things go wrong."""

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import timm
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg

from tamzoo import hub, registry
from tamzoo.catalogue import ENTRIES, Entry
from tamzoo.checkpoint import sha256_of
from tamzoo.hub import fetch_weights
from tests.hub_server import Hub, patient_client
from tests.standins import stand_in

NAME = "resnet20_tam.cifar10"
CDN = {"method": "GET", "path": "/cdn/"}
HEAD = {"method": "HEAD"}
ALWAYS = {"times": -1}


@pytest.fixture
def entry(server, tmp_path) -> Entry:
    """A trained entry, published at v1."""
    made = stand_in(tmp_path / "cards")
    server.store.create(made.hub_id)
    content = (tmp_path / "cards" / NAME / "model.safetensors").read_bytes()
    oid, _ = server.store.push(
        made.hub_id, "main", "weights", {"model.safetensors": server.store.add_blob(content)}
    )
    server.store.set_ref(made.hub_id, "refs/tags/v1", oid)
    assert made.trained
    return replace(made, trained=replace(made.trained, revision="v1"))


@pytest.fixture
def fetch(server, entry, tmp_path):
    return lambda **kwargs: fetch_weights(entry, tmp_path / "cache", endpoint=server.url, **kwargs)


def whole(path: Path, entry: Entry) -> bool:
    return entry.trained is not None and sha256_of(path) == entry.trained.sha256


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").glob("models--*/snapshots/*/*") if path.exists()]


def damage(path: Path, size: int | None = None) -> None:
    content = bytearray(path.read_bytes()[:size])
    content[-1] ^= 0xFF
    path.resolve().write_bytes(content)


RIDDEN_OUT = {
    "the first request is answered 503": HEAD | {"status": 503},
    "the first request is answered 500": HEAD | {"status": 500},
    "the download is answered 429": CDN | {"status": 429, "headers": {"Retry-After": "0"}},
    "the connection drops in mid-file": CDN | {"drop": 1000},
    "the connection drops in mid-file, five times": CDN | {"drop": 1000, "times": 5},
    "the connection drops before the first byte": CDN | {"drop": 0},
    "the download stalls past the timeout": CDN | {"delay": 0.5},
    "the answers are slow": CDN | {"delay": 0.1},
    "a byte arrives changed": CDN | {"corrupt": True},
}


@patient_client
@pytest.mark.parametrize("fault", RIDDEN_OUT)
def test_the_user_notices_nothing_when(fault, server, entry, fetch):
    injected = server.fault(**RIDDEN_OUT[fault])
    assert whole(fetch(), entry)
    assert injected.seen and injected.times == 0


# what goes wrong -> the fault, and what the user reads after the entry's name
TOLD = {
    "the Hub is down": (HEAD | ALWAYS | {"status": 503}, "error of its own (503); try again later"),
    "the storage is down": (CDN | ALWAYS | {"status": 500}, "error of its own (500); try again later"),
    "requests are limited for long": (
        HEAD | ALWAYS | {"status": 429},
        "fewer requests (429); wait some minutes",
    ),
    "the first request gets no answer": (
        HEAD | ALWAYS | {"drop": -1},
        "cannot be reached (RemoteProtocolError); check the connection",
    ),
    "no byte ever arrives": (CDN | ALWAYS | {"drop": 0}, "cannot be reached (RemoteProtocolError)"),
    "the download never starts": (CDN | ALWAYS | {"delay": 0.5}, "cannot be reached (ReadTimeout)"),
    "bodies are cut short": (CDN | ALWAYS | {"cut": 1000}, "was cut short; try again"),
    "a login page answers for the Hub": (
        HEAD | ALWAYS | {"status": 200},
        "does not answer as a Hub; check HF_ENDPOINT and the proxy",
    ),
    "the revision disappears": (
        {"before": lambda server: server.store.set_ref(f"tamzoo/{NAME}", "refs/tags/v1", None)},
        "has no revision v1; update tamzoo",
    ),
    "the file disappears": (
        {"before": lambda server: empty(server)},
        "at v1 does not hold what was asked for; update tamzoo",
    ),
    "the repository disappears": (
        {"before": lambda server: server.store.delete(f"tamzoo/{NAME}")},
        "there is no repository tamzoo/resnet20_tam.cifar10, or it is private; check its owner",
    ),
    "the repository turns private": (
        {"before": lambda server: server.store.change(f"tamzoo/{NAME}", private=True)},
        "log in with `hf auth login` or set HF_TOKEN",
    ),
    "the repository turns gated": (
        {"before": lambda server: server.store.change(f"tamzoo/{NAME}", gated="manual")},
        "access to tamzoo/resnet20_tam.cifar10 is restricted; ask for it at",
    ),
    "the account is blocked": (
        HEAD | {"status": 403, "message": "suspended"},
        "the token may not do this on tamzoo/resnet20_tam.cifar10 (suspended)",
    ),
}


def empty(server: Hub) -> None:
    oid, _ = server.store.push(f"tamzoo/{NAME}", "main", "gone", {}, ["model.safetensors"])
    server.store.set_ref(f"tamzoo/{NAME}", "refs/tags/v1", oid, replace=True)


@pytest.mark.parametrize("fault", TOLD)
def test_the_user_is_told_in_one_sentence_when(fault, server, entry, fetch, tmp_path):
    injected, sentence = TOLD[fault]
    server.fault(**injected)
    with pytest.raises(OSError, match=rf"^{re.escape(NAME)}: .*{re.escape(sentence)}") as told:
        fetch()
    assert "\n" not in str(told.value) and str(tmp_path) not in str(told.value)
    assert not cached_files(tmp_path)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_wrong", "the Hub refuses the token; log in again"),
        ("hf_reader", "there is no repository tamzoo/resnet20_tam.cifar10, or it is private"),
        (None, "there is no repository tamzoo/resnet20_tam.cifar10, or it is private"),
    ],
)
def test_a_private_repository_needs_the_right_token(
    token, sentence, server, entry, fetch, tmp_path, monkeypatch
):
    server.store.change(entry.hub_id, private=True)
    with pytest.raises(OSError, match=re.escape(sentence)) as told:
        fetch(token=token)
    assert "hf_" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert whole(fetch(), entry)


def test_weights_that_are_never_the_catalogues_are_refused_and_deleted(server, entry, fetch, tmp_path):
    server.fault(**CDN, **ALWAYS, corrupt=True)
    with pytest.raises(
        ValueError, match=r"^resnet20_tam\.cifar10: .* SHA-256 .* deleted from the cache\. Update"
    ):
        fetch()
    assert not cached_files(tmp_path) and not list((tmp_path / "cache").rglob("blobs/*"))
    server.faults.clear()
    assert whole(fetch(), entry)


def test_a_mirror_with_other_weights_of_the_same_size_is_refused(server, entry, fetch, tmp_path):
    other = stand_in(tmp_path / "other", seed=1)
    content = (tmp_path / "other" / NAME / "model.safetensors").read_bytes()
    assert len(content) == len((tmp_path / "cards" / NAME / "model.safetensors").read_bytes())
    oid, _ = server.store.push(
        entry.hub_id, "main", "other", {"model.safetensors": server.store.add_blob(content)}
    )
    server.store.set_ref(entry.hub_id, "refs/tags/v1", oid, replace=True)
    assert other.trained
    with pytest.raises(ValueError, match=other.trained.sha256[:12]):
        fetch()


@pytest.mark.parametrize("size", [None, 1000], ids=["same size", "truncated"])
def test_a_damaged_cached_file_is_fetched_again(size, entry, fetch):
    path = fetch()
    damage(path, size)
    assert whole(fetch(), entry)


def test_a_damaged_cached_file_without_a_connection_is_told(server, fetch):
    damage(fetch())
    server.fault(**HEAD, **ALWAYS, status=503)
    with pytest.raises(OSError, match="its cached weights are damaged, and"):
        fetch()


def test_what_a_killed_process_left_behind_does_no_harm(server, entry, fetch, tmp_path):
    path = fetch()
    (path.resolve().with_suffix(".0123abcd.incomplete")).write_bytes(b"half")
    path.resolve().unlink()  # the link in the snapshot now leads nowhere
    assert whole(fetch(), entry)


def test_a_cached_file_needs_no_network(server, entry, fetch, monkeypatch):
    fetch()
    server.log.clear()
    server.store.delete(entry.hub_id)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert whole(fetch(), entry)
    assert server.log == []


def test_offline_with_an_empty_cache_is_told(fetch, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="is not in the cache and HF_HUB_OFFLINE is set; unset it once"):
        fetch()


def test_offline_with_a_damaged_cache_is_told(fetch, monkeypatch):
    damage(fetch())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cached weights are damaged, and .* HF_HUB_OFFLINE is set"):
        fetch()


def test_a_hub_that_is_not_there_is_told(entry, tmp_path):
    with pytest.raises(OSError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError\)"):
        fetch_weights(entry, tmp_path / "cache", endpoint="http://127.0.0.1:9")
    with pytest.raises(OSError, match=r": http://127.0.0.1:9 cannot be reached"):
        fetch_weights(entry, tmp_path / "cache", endpoint="http://joe:secret@127.0.0.1:9")


def test_a_transfer_that_xet_gives_up_is_told(entry, fetch, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Data processing error: CAS service error : connection reset")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(
        OSError, match=rf"^{NAME}: the transfer failed .*reset.*; try again, or with HF_HUB_DIS"
    ):
        fetch()


def test_a_cache_that_cannot_be_written_is_told(server, entry, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="free or choose another folder with cache_dir or HF_HOME"):
        fetch_weights(entry, tmp_path / "file", endpoint=server.url)


def test_the_clones_weights_come_first_and_are_checked(server, entry, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CARDS", tmp_path / "cards")
    assert fetch() == tmp_path / "cards" / NAME / "model.safetensors"
    assert server.log == []
    damage(fetch())
    with pytest.raises(ValueError, match="the catalogue says"):
        fetch()


def test_an_untrained_entry_has_nothing_to_fetch(entry):
    with pytest.raises(RuntimeError, match="no trained weights yet; for random ones pass pretrained=False"):
        fetch_weights(replace(entry, trained=None))


def test_parallel_fetches_share_one_cache(server, entry, fetch):
    server.fault(**CDN, delay=0.1)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(), range(4)))
    assert len(set(paths)) == 1 and whole(paths[0], entry)


@pytest.fixture
def registered(entry, server, monkeypatch):
    """The stand-in as create_model sees a trained entry; the endpoint as HF_ENDPOINT sets it."""
    monkeypatch.setitem(ENTRIES, NAME, entry)
    found = get_pretrained_cfg(NAME)
    assert found is not None
    cfg = replace(found, hf_hub_id=f"{entry.hub_id}@v1")
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, NAME, cfg)
    return entry


def test_create_model_fetches_and_checks(registered, server, tmp_path):
    server.fault(**CDN, corrupt=True)
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "cache")
    stored = load_file(tmp_path / "cards" / NAME / "model.safetensors")
    assert (model.state_dict()["conv1.weight"] == stored["conv1.weight"].float()).all()
    server.store.delete(registered.hub_id)
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "cache", num_classes=3)
    with pytest.raises(OSError, match="there is no repository"):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "elsewhere")


def test_timms_own_sources_still_work(registered, server, tmp_path):
    file = tmp_path / "cards" / NAME / "model.safetensors"
    weights = load_file(file)
    server.log.clear()
    for overlay in ({"file": str(file)}, {"state_dict": weights}):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    assert server.log == []
    config = (file.parent / "config.json").read_bytes()
    server.store.push(registered.hub_id, "main", "config", {"config.json": config})
    cache = tmp_path / "cache"
    model = timm.create_model(f"hf-hub:{registered.hub_id}", pretrained=True, cache_dir=cache)
    assert cast(dict, model.pretrained_cfg)["tag"] == "cifar10"
    assert registry.find_model(NAME) == NAME


FRESH = """
    import sys
    from dataclasses import replace
    from tamzoo import hub
    from tamzoo.catalogue import ENTRIES
    from tamzoo.weights import Trained
    hub.CARDS = None
    trained = Trained(sha256=sys.argv[1], recipe="short", revision="v1")
    print(hub.fetch_weights(replace(ENTRIES["resnet20_tam.cifar10"], trained=trained)))
"""


@pytest.mark.slow
def test_fresh_processes_fetch_through_a_mirror_at_once(server, entry, tmp_path):
    assert entry.trained
    command = [sys.executable, "-c", textwrap.dedent(FRESH), entry.trained.sha256]
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=300
                ),
                range(2),
            )
        )
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert whole(Path(run.stdout.strip()), entry)
