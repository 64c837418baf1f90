"""The loopback Hub, driven by huggingface_hub's own client and nothing else."""

import hashlib
import warnings

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import Hub, client_validates_anywhere, loopback, patient_client, running_hub

# huggingface_hub's own upload raises it inside httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "tamzoo/small"
WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: apache-2.0\ntags: [a]\n---\n# A card\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with loopback(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_writer")


@pytest.fixture
def repo(api):
    api.create_repo(REPO)
    operations = [
        CommitOperationAdd("README.md", CARD),
        CommitOperationAdd("model.safetensors", WEIGHTS),
        CommitOperationAdd("logs/a.csv", b"epoch\n1\n"),
    ]
    return api.create_commit(REPO, operations, commit_message="first")


def download(hub: Hub, cache, path="model.safetensors", **kwargs) -> bytes:
    kwargs = {"token": "hf_writer", "cache_dir": cache} | kwargs
    with open(hf_hub_download(REPO, path, endpoint=hub.url, **kwargs), "rb") as file:  # noqa: PTH123
        return file.read()


def test_a_commit_comes_back_byte_for_byte(hub, api, repo, tmp_path):
    assert download(hub, tmp_path) == WEIGHTS
    assert download(hub, tmp_path, "README.md") == CARD
    assert download(hub, tmp_path, "logs/a.csv", revision=repo.oid) == b"epoch\n1\n"
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == repo.oid
    lfs = {sibling.rfilename: sibling.lfs for sibling in info.siblings}
    assert lfs["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert lfs["README.md"] is None
    assert [commit["title"] for _, commit in hub.store.history(REPO)] == ["first", "initial commit"]


def test_snapshots_and_trees_agree(hub, api, repo, tmp_path):
    folder = api.snapshot_download(REPO, cache_dir=tmp_path)
    files = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert set(api.list_repo_files(REPO)) == {
        ".gitattributes",
        "README.md",
        "logs/a.csv",
        "model.safetensors",
    }
    assert "logs" in files
    with open(f"{folder}/logs/a.csv", "rb") as file:  # noqa: PTH123
        assert file.read() == b"epoch\n1\n"
    assert files["model.safetensors"].size == len(WEIGHTS)


def test_an_equal_file_is_not_uploaded_again(hub, api, repo):
    hub.log.clear()
    again = [CommitOperationAdd("README.md", CARD), CommitOperationAdd("model.safetensors", WEIGHTS)]
    assert api.create_commit(REPO, again, commit_message="again").oid == repo.oid
    assert not [path for method, path, _ in hub.log if method == "PUT" or "/commit/" in path]


def test_what_is_deleted_stays_at_the_commit_before(hub, api, repo, tmp_path):
    api.create_commit(REPO, [CommitOperationDelete("logs/")], commit_message="away")
    with pytest.raises(EntryNotFoundError):
        download(hub, tmp_path, "logs/a.csv")
    assert download(hub, tmp_path, "logs/a.csv", revision=repo.oid) == b"epoch\n1\n"


def test_tags_and_refs(hub, api, repo, tmp_path):
    api.create_tag(REPO, tag="v1")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.create_tag(REPO, tag="v1")
    refs = api.list_repo_refs(REPO)
    assert [tag.name for tag in refs.tags] == ["v1"] and refs.tags[0].target_commit == repo.oid
    assert [branch.name for branch in refs.branches] == ["main"]
    assert download(hub, tmp_path, revision="v1") == WEIGHTS
    with pytest.raises(RevisionNotFoundError):
        download(hub, tmp_path, revision="v2")


def test_pull_requests_are_opened_read_and_merged(hub, api, repo, tmp_path):
    reader = HfApi(endpoint=hub.url, token="hf_reader")
    hub.tokens = hub.tokens | {"hf_guest": {"name": "guest", "orgs": [], "role": "write"}}
    guest = HfApi(endpoint=hub.url, token="hf_guest")
    made = guest.create_commit(REPO, [CommitOperationAdd("y.bin", b"y")], commit_message="y", create_pr=True)
    assert made.pr_num == 1 and made.pr_revision == "refs/pr/1"
    assert download(hub, tmp_path, "y.bin", revision="refs/pr/1") == b"y"
    assert not api.file_exists(REPO, "y.bin")
    api.merge_pull_request(REPO, 1)
    assert api.file_exists(REPO, "y.bin")
    made = guest.create_commit(REPO, [CommitOperationAdd("x", b"x")], commit_message="x", create_pr=True)
    assert made.pr_num == 2
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.create_commit(REPO, [CommitOperationAdd("z", b"z")], commit_message="z", create_pr=True)


def test_tokens_privacy_and_gates(hub, api, repo, tmp_path):
    assert api.whoami()["name"] == "writer"
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(REPO)
    assert refused.value.response.status_code == 401
    hub.store.change(REPO, private=True)
    for token in (False, "hf_reader"):
        with pytest.raises(RepositoryNotFoundError):
            download(hub, tmp_path / "a", token=token)
    assert download(hub, tmp_path / "b") == WEIGHTS
    hub.store.change(REPO, private=False, gated="manual")
    with pytest.raises(GatedRepoError):
        download(hub, tmp_path / "c", token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="rights"):
        HfApi(endpoint=hub.url, token="hf_writer").create_repo("someone/else")
    with pytest.raises(HfHubHTTPError):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_collections_hold_each_item_once(hub, api, repo):
    made = api.create_collection("All of it", namespace="tamzoo", description="d")
    assert api.create_collection("All of it", namespace="tamzoo", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, REPO, "model")
    api.add_collection_item(made.slug, REPO, "model", exists_ok=True)
    assert [item.item_id for item in api.get_collection(made.slug).items] == [REPO]
    assert [row.title for row in api.list_collections(owner="tamzoo")] == ["All of it"]
    with pytest.raises(HfHubHTTPError):
        api.add_collection_item(made.slug, "tamzoo/absent", "model", exists_ok=True)


@client_validates_anywhere
def test_cards_are_validated(hub, api, repo, monkeypatch):
    ModelCard(CARD.decode()).validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: mine\n---\n").validate()
    bad = CommitOperationAdd("README.md", b"---\nmodel-index:\n- name: x\n---\n")
    with pytest.raises(ValueError, match="results"):
        api.create_commit(REPO, [bad], commit_message="bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="empty or missing yaml"):
            api.create_commit(REPO, [CommitOperationAdd("README.md", b"# none")], commit_message="none")


def test_a_stale_parent_is_refused_and_nothing_changes(hub, api, repo):
    api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="a")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(REPO, [CommitOperationAdd("b", b"b")], commit_message="b", parent_commit=repo.oid)
    assert refused.value.response.status_code == 412
    assert "b" not in api.list_repo_files(REPO)


def test_the_state_is_on_disk(tmp_path, hub, api, repo):
    with running_hub(tmp_path / "hub") as again:
        assert HfApi(endpoint=again.url).model_info(REPO).sha == repo.oid


@patient_client
@pytest.mark.parametrize(
    "fault",
    [
        {"path": "/cdn/", "drop": 1000},
        {"path": "/cdn/", "status": 429, "headers": {"Retry-After": "0"}},
        {"path": "/cdn/", "delay": 0.05},
        {"method": "HEAD", "status": 503},
    ],
    ids=lambda fault: "-".join(fault),
)
def test_the_client_rides_out_one_fault(hub, repo, tmp_path, fault):
    injected = hub.fault(**fault)
    assert download(hub, tmp_path) == WEIGHTS
    assert injected.times == 0


@patient_client
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"path": "/cdn/", "status": 500, "times": -1}, HfHubHTTPError),
        ({"path": "/cdn/", "cut": 1000, "times": -1}, OSError),
        ({"path": "/cdn/", "drop": 0, "times": -1}, Exception),
        ({"method": "HEAD", "status": 502, "times": -1}, LocalEntryNotFoundError),
        ({"method": "HEAD", "status": 404, "code": "RevisionNotFound"}, RevisionNotFoundError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_client_reports_a_lasting_fault(hub, repo, tmp_path, fault, error):
    hub.fault(**fault)
    with pytest.raises(error):
        download(hub, tmp_path)
    assert not list(tmp_path.glob("models--*/snapshots/*/*"))


def test_the_client_accepts_a_corrupted_blob_of_the_right_size(hub, repo, tmp_path):
    hub.fault(path="/cdn/", corrupt=True)
    found = download(hub, tmp_path)
    assert found != WEIGHTS and len(found) == len(WEIGHTS)


def test_an_interrupted_commit_leaves_nothing_and_the_next_finishes(hub, api, repo):
    hub.fault(path="/commit/", refuse_effect=True)
    add = {"new.safetensors": b"new" * 100, "n.txt": b"n"}
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit(
            REPO, [CommitOperationAdd(path, text) for path, text in add.items()], commit_message="n"
        )
    assert api.model_info(REPO).sha == repo.oid
    hub.log.clear()
    api.create_commit(
        REPO, [CommitOperationAdd(path, text) for path, text in add.items()], commit_message="n"
    )
    assert set(add) <= set(api.list_repo_files(REPO))
    assert not [path for method, path, _ in hub.log if method == "PUT"], "the blob was there already"
