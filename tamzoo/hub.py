"""Weights from the clone, the Hub's cache or the Hub, checked against the catalogue."""

import hashlib
from json import JSONDecodeError
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HTTPError,  # httpx's in huggingface_hub 1.x, httpx2's in 2.x
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tamzoo.catalogue import Entry
from tamzoo.checkpoint import WEIGHTS, check_weights_file, sha256_of

_STRANGE = (FileMetadataError, JSONDecodeError, KeyError, TypeError)  # of answers that are not a Hub's
# hf_xet raises RuntimeError
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError, *_STRANGE)
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_PACKAGE = Path(__file__).parent
CARDS = next(
    (path for path in (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards") if path.is_dir()), None
)
CLONED = CARDS is not None and CARDS.parent != _PACKAGE  # every entry has its folder; a wheel has a few


def entry_folder(name: str) -> Path | None:
    """The entry's folder in the clone or the wheel, where its weights are there."""
    folder = CARDS / name if CARDS else None
    return folder if folder and (folder / WEIGHTS).is_file() else None


def fetch_weights(
    entry: Entry,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """The entry's weights file: from the clone or wheel, else the Hub's cache, else the Hub.

    Whatever the source, the file's SHA-256 is the catalogue's: huggingface_hub itself compares only
    sizes. A damaged file in the cache is downloaded anew, once.

    Args:
        cache_dir: In place of huggingface_hub's own cache.
        token: As huggingface_hub takes it; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: In place of HF_ENDPOINT.
    Raises:
        RuntimeError: the entry has no trained weights.
        ValueError: the file is not the catalogue's.
        OSError: it cannot be had; names the entry, the reason and the way out.
    """
    if entry.trained is None:
        raise RuntimeError(f"{entry.name} has no trained weights yet; for random ones pass pretrained=False")
    sha256, revision = entry.trained.sha256, entry.trained.revision
    folder = entry_folder(entry.name)
    if folder:
        check_weights_file(folder / WEIGHTS, sha256)
        return folder / WEIGHTS
    cached = try_to_load_from_cache(entry.hub_id, WEIGHTS, cache_dir=cache_dir, revision=revision)
    damaged = isinstance(cached, str)
    if isinstance(cached, str) and sha256_of(Path(cached)) == sha256:
        return Path(cached)
    path = None
    for again in (True,) if damaged else (False, True):
        try:
            found = hf_hub_download(
                entry.hub_id,
                WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                endpoint=endpoint,
                library_name="tamzoo",
                force_download=again,  # replaces the file only when the new one is whole
            )
        except HUB_ERRORS as error:
            reason = explain(error, entry.hub_id, revision, endpoint)
            state = "its cached weights are damaged, and " if damaged else ""
            raise OSError(f"{entry.name}: {state}{reason}") from error
        path = Path(found)
        if sha256_of(path) == sha256:
            return path
        damaged = True
    assert path is not None
    raise ValueError(_discard(path, entry))


def _discard(path: Path, entry: Entry) -> str:
    """Deletes weights that are not the catalogue's from the cache, and says so."""
    assert entry.trained is not None
    found, wanted = sha256_of(path), entry.trained.sha256
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return (
        f"{entry.name}: {entry.hub_id} at {entry.trained.revision} serves weights with SHA-256 "
        f"{found[:12]}..., the catalogue says {wanted[:12]}...; they were deleted from the cache. "
        "Update tamzoo, or fetch from another HF_ENDPOINT"
    )


def without_user(url: str) -> str:
    """The same URL, fit to be shown: without a user's name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def explain(error: BaseException, repo: str, revision: str | None = None, endpoint: str | None = None) -> str:
    """What went wrong at the Hub and the way out, in one sentence without its subject."""
    cause = error
    while isinstance(cause, LocalEntryNotFoundError | RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__  # these wrap what happened on the network
    endpoint = without_user(endpoint or constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | ValueError):
        return f"{repo} is not in the cache and HF_HUB_OFFLINE is set; unset it once to download"
    for kind, text in {
        GatedRepoError: f"access to {repo} is restricted; ask for it at {endpoint}/{repo}, then {LOGIN}",
        RepositoryNotFoundError: f"there is no repository {repo}, or it is private; "
        f"check its owner (TAMZOO_HUB_OWNER) and {LOGIN}",
        RevisionNotFoundError: f"{repo} has no revision {revision or 'main'}; update tamzoo",
        LocalTokenNotFoundError: f"no token was found; {LOGIN}",
        _STRANGE: f"{endpoint} does not answer as a Hub; check HF_ENDPOINT and the proxy",
    }.items():
        if isinstance(cause, kind):
            return text
    response = getattr(cause, "response", None)
    if response is not None:
        return _explain_status(response.status_code, cause, repo, revision)
    if isinstance(cause, HTTPError | LocalEntryNotFoundError):
        kind = type(cause).__name__
        return f"{endpoint} cannot be reached ({kind}); check the connection and HF_ENDPOINT, and try again"
    if isinstance(cause, OSError) and cause.strerror:
        place = cause.filename or "the cache"
        return f"{place}: {cause.strerror}; free or choose another folder with cache_dir or HF_HOME"
    if "Data processing error" in str(cause):  # hf_xet's
        return f"the transfer failed ({str(cause).strip()}); try again, or with HF_HUB_DISABLE_XET=1"
    if "Consistency check failed" in str(cause):
        return f"the download from {endpoint} was cut short; try again"
    return str(cause).strip(". \n").replace("\n", " ")


def _explain_status(status: int, cause: BaseException, repo: str, revision: str | None) -> str:
    told = " ".join(str(getattr(cause, "server_message", "") or "").split())
    if status == 404:
        return f"{repo} at {revision or 'main'} does not hold what was asked for; update tamzoo"
    if status == 401:
        return "the Hub refuses the token; log in again with `hf auth login` or correct HF_TOKEN"
    if status == 403:
        return f"the token may not do this on {repo} ({told}); use one that has the right"
    if status == 412:
        return f"someone else has pushed to {repo} meanwhile; run the command again"
    if status == 429:
        return "the Hub asks for fewer requests (429); wait some minutes and try again"
    if status >= 500:
        return f"the Hub answers with an error of its own ({status}); try again later"
    return f"the Hub answers {status} ({told})"


def hash_like(listed: str, path: Path) -> str:
    """The file's hash in the kind that the Hub lists: SHA-256 for a large file, git's SHA-1 for a small."""
    if len(listed) == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(api: HfApi, repo_id: str, revision: str | None = None) -> tuple[str | None, dict[str, str]]:
    """The commit and, by path, the hashes of a repository's files."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    files = {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
        for sibling in info.siblings or []
        if sibling.rfilename != ".gitattributes"  # the Hub's own file in every repository
    }
    return info.sha, files
