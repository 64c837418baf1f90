"""Entries to the Hub: uploaded in one commit each, tagged and collected."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from tamzoo.catalogue import HUB_OWNER
from tamzoo.checkpoint import WEIGHTS
from tamzoo.hub import HUB_ERRORS, LOGIN, explain, hash_like, listing, without_user
from tamzoo.staging import Staged
from tamzoo.weights import TAG

COLLECTION = "Tree-structured attention for image classification"


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


@contextmanager
def _told(name: str, repo_id: str, api: HfApi) -> Iterator[None]:
    """Turns what happens at the Hub into one sentence that names the entry."""
    try:
        yield
    except HUB_ERRORS as error:
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
            url=f"{without_user(api.endpoint)}/{repo_id}",
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
