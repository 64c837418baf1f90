"""Entries to the Hub: staged, validated, uploaded in one commit each, tagged and collected."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError
from torch import nn

from tamzoo import __version__
from tamzoo.cards import card_files, pictures
from tamzoo.catalogue import HUB_OWNER, Entry
from tamzoo.checkpoint import write_whole
from tamzoo.data import Split, load_split
from tamzoo.datasets import Dataset
from tamzoo.evaluate import evaluate
from tamzoo.findings import ANALYSIS
from tamzoo.hub import LOGIN, WEIGHTS, explain, hash_like, listing
from tamzoo.progress import Progress, silent
from tamzoo.records import Score, read_record
from tamzoo.verify import ONNX, stored_analysis, stored_golden, verify_folder

TAG = f"v{__version__}"
COLLECTION = "Tree-structured attention for image classification"


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A folder that is, byte for byte, what a Hub repository will hold."""

    entry: Entry
    folder: Path
    owner: str

    @property
    def repo_id(self) -> str:
        return f"{self.owner}/{self.entry.name}"

    @property
    def files(self) -> dict[str, Path]:
        return {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a publication did, or would do."""

    repo_id: str
    url: str
    uploaded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    tag: str | None = None  # made now, or to be made
    pull_request: str | None = None
    dry_run: bool = False

    def __str__(self) -> str:
        would = "would be " if self.dry_run else ""
        told = [
            f"{would}{what}: {', '.join(paths)}"
            for what, paths in (("uploaded", self.uploaded), ("deleted", self.deleted))
            if paths
        ]
        told += [f"{would}tagged {self.tag}"] if self.tag else []
        return f"{self.pull_request or self.url}: {'; '.join(told) or 'nothing to upload'}"


def stage(
    entry: Entry,
    source: Path,
    folder: Path,
    *,
    owner: str = HUB_OWNER,
    export: Callable[[nn.Module, Path], Any] | None = None,
    check: Callable[[nn.Module, Entry], Any] | None = None,
) -> Staged:
    """Lays out and validates what an entry's Hub repository will hold.

    Args:
        source: The entry's folder of model_cards.
        folder: Empty; becomes the repository.
        export: Writes a model as one ONNX file and raises where the two do not agree.
        check: Raises where the staged model is not what its record says, see `check_sample`.
    Raises:
        ValueError: the entry is not trained, or what is in `source` is not what should be published.
    """
    if entry.trained is None:
        raise ValueError(f"{entry.name} has no trained weights yet; only trained entries are published")
    problems = verify_folder(entry, source)
    if problems:
        raise ValueError(f"{entry.name} cannot be published: {'; '.join(problems)}")
    record, analysis = read_record(source / "record.json"), stored_analysis(source)
    measured = [ANALYSIS] if analysis else []
    for path in (WEIGHTS, "record.json", "log.csv", *measured, *pictures(record, analysis)):
        shutil.copyfile(source / path, folder / path)
    for path, text in card_files(entry, record, stored_golden(source), owner, analysis).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, text)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if check:
        check(model, entry)
    if export:
        (folder / ONNX).parent.mkdir()
        export(model, folder / ONNX)
    return Staged(entry=entry, folder=folder, owner=owner)


def check_sample(model: nn.Module, entry: Entry, split: Split, score: Score, n: int = 1000) -> None:
    """Sees that a model errs on a sample of the test split as often as its record says.

    Raises:
        ValueError: the errors differ by more than four standard errors of such a sample.
    """
    sample = Split(pixels=split.pixels[:n], labels=split.labels[:n])
    found, expected = evaluate(model, sample, entry.dataset).top1_error, score.top1_error
    spread = 100 * (max(expected / 100 * (1 - expected / 100), 1e-4) / len(sample)) ** 0.5
    if abs(found - expected) > 4 * spread:
        raise ValueError(
            f"{entry.name}: the staged weights err on {found:.1f} % of {len(sample)} test images, "
            f"the record says {expected:.1f} %; evaluate them again"
        )


def sampler(data: Path, cards: Path, progress: Progress = silent) -> Callable[[nn.Module, Entry], None]:
    """A `check` for `stage` that evaluates on a sample; each test split is loaded once.

    Args:
        data: Holds the data sets, as for `data.load_split`.
        cards: Holds a folder with a record for every entry.
    """

    @cache
    def split(dataset: Dataset) -> Split:
        return load_split(data, dataset, "test", progress)

    def check(model: nn.Module, entry: Entry) -> None:
        check_sample(
            model, entry, split(entry.dataset), read_record(cards / entry.name / "record.json").score
        )

    return check


@contextmanager
def _told(name: str, repo_id: str, api: HfApi) -> Iterator[None]:
    """Turns what happens at the Hub into one sentence that names the entry."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError) as error:
        reason = explain(error, repo_id, endpoint=api.endpoint)
        raise RuntimeError(f"{name}: {reason}. Nothing is half-published: publish again to finish") from error


def _check_writer(api: HfApi, owner: str) -> None:
    user = api.whoami()
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise RuntimeError(f"the token of {user['name']} may only read; {LOGIN} with one that may write")
    if owner not in owners:
        raise RuntimeError(
            f"{user['name']} may not write to {owner}; choose --owner from {', '.join(owners)} or --create-pr"
        )


def publish(
    staged: Staged, api: HfApi, *, private: bool = False, create_pr: bool = False, dry_run: bool = False
) -> Published:
    """Makes an entry's Hub repository equal to the staged folder, in one commit, and tags it.

    Files that are there already are not uploaded, so that a second run changes nothing and an
    interrupted one is finished. A tag never moves: with a new card, the version's tag stays.

    Args:
        create_pr: Opens a pull request; the tag is made by a run after its merge.
        dry_run: Only reads, and says what would be done.
    Raises:
        RuntimeError: the Hub, the network or the token; names the entry, the reason and the way out.
    """
    repo_id = staged.repo_id
    with _told(staged.entry.name, repo_id, api):
        if not (create_pr or dry_run):
            _check_writer(api, staged.owner)
        try:
            head, present = listing(api, repo_id)
        except RepositoryNotFoundError:
            head, present = None, {}
            if not dry_run:
                api.create_repo(repo_id, private=private, exist_ok=True)
                head, present = listing(api, repo_id)
        tagged = _check_tag(staged, api) if head else False
        uploaded = [path for path, file in staged.files.items() if _changed(file, present.get(path))]
        deleted = sorted(present.keys() - staged.files.keys())
        done = Published(
            repo_id=repo_id,
            url=f"{api.endpoint}/{repo_id}",
            uploaded=uploaded,
            deleted=deleted,
            tag=None if tagged or create_pr else TAG,
            dry_run=dry_run,
        )
        return done if dry_run else _upload(staged, api, done, head, create_pr)


def _changed(file: Path, present: str | None) -> bool:
    return present is None or hash_like(present, file) != present


def _check_tag(staged: Staged, api: HfApi) -> bool:
    """Whether this version is tagged already; an error where the tag holds other weights."""
    if TAG not in [tag.name for tag in api.list_repo_refs(staged.repo_id).tags]:
        return False
    tagged = listing(api, staged.repo_id, TAG)[1].get(WEIGHTS)
    if tagged is None or _changed(staged.folder / WEIGHTS, tagged):
        raise ValueError(
            f"{TAG} of {staged.repo_id} is tagged with other weights; raise tamzoo's version first"
        )
    return True


def _upload(staged: Staged, api: HfApi, todo: Published, head: str | None, create_pr: bool) -> Published:
    files, pull_request = staged.files, None
    operations = [CommitOperationAdd(path, files[path]) for path in todo.uploaded]
    operations += [CommitOperationDelete(path) for path in todo.deleted]
    if operations:
        made = api.create_commit(
            staged.repo_id,
            operations,
            commit_message=f"Publish {staged.entry.name} {TAG}",
            parent_commit=head,  # so that nobody's push in between is overwritten
            create_pr=create_pr,
        )
        head, pull_request = made.oid, made.pr_url
    if todo.tag:
        api.create_tag(staged.repo_id, tag=todo.tag, revision=head, exist_ok=True)
    return replace(todo, pull_request=pull_request)


def collect(repo_ids: list[str], api: HfApi, owner: str = HUB_OWNER, *, private: bool = False) -> str:
    """Puts repositories into the owner's collection, made where missing, and returns its URL.

    Raises:
        RuntimeError: the Hub, the network or the token.
    """
    with _told("the collection", f"{owner}/{COLLECTION}", api):
        slugs = [row.slug for row in api.list_collections(owner=owner) if row.title == COLLECTION]
        if slugs:
            collection = api.get_collection(slugs[0])
        else:
            collection = api.create_collection(COLLECTION, namespace=owner, private=private, exists_ok=True)
        for repo_id in sorted(set(repo_ids) - {item.item_id for item in collection.items}):
            collection = api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
        return collection.url


def release(
    entries: Iterable[Entry],
    api: HfApi,
    cards: Path,
    *,
    owner: str = HUB_OWNER,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    export: Callable[[nn.Module, Path], Any] | None = None,
    check: Callable[[nn.Module, Entry], Any] | None = None,
) -> Iterator[Published]:
    """Stages and publishes one entry after another; the first that fails ends it.

    Args:
        cards: Holds a folder for every entry.
        export: As for `stage`; so is `check`.
    """
    for entry in entries:
        with TemporaryDirectory(prefix="tamzoo-") as folder:
            staged = stage(
                entry,
                cards / entry.name,
                Path(folder),
                owner=owner,
                export=export,
                check=check,
            )
            yield publish(staged, api, private=private, create_pr=create_pr, dry_run=dry_run)
