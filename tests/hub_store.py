"""What a Hub keeps, as files in a folder: repositories, commits, blobs, refs and collections.

    blobs/SHA256                    contents, regular and LFS alike
    repos/OWNER/NAME/repo.json      {private, gated, refs}
    repos/OWNER/NAME/commits/OID    {parent, title, date, files: {path: file}}
    collections.json

A change takes effect with one renaming at its end, as a push to the real Hub does, so that an
interrupted one leaves nothing but unused blobs.
"""

import hashlib
import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".png")
LFS_SIZE = 10 * 1024 * 1024  # bytes; larger files are always LFS
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class Refused(Exception):
    """A request that the Hub answers with an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Store:
    """The state of one Hub; every method is one transaction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{threading.get_ident()}")
        part.write_bytes(content)
        part.replace(path)

    def _write_json(self, path: Path, value: Any) -> None:
        self._write(path, json.dumps(value, indent=1).encode())

    # Blobs

    def add_blob(self, content: bytes, expected: str | None = None) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if expected is not None and expected != sha256:
            raise Refused(400, f"the content is {sha256}, not {expected}")
        self._write(self.folder / "blobs" / sha256, content)
        return sha256

    def has_blob(self, sha256: str, size: int | None = None) -> bool:
        path = self.folder / "blobs" / sha256
        return path.is_file() and size in (None, path.stat().st_size)

    def blob(self, sha256: str) -> bytes:
        return (self.folder / "blobs" / sha256).read_bytes()

    def _file(self, content: bytes | None, sha256: str, lfs: bool) -> dict[str, Any]:
        size = (self.folder / "blobs" / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        stored = pointer if lfs else (self.blob(sha256) if content is None else content)
        return {
            "sha256": sha256,
            "size": size,
            "lfs": lfs,
            "oid": git_oid(stored),
            "pointer_size": len(pointer),
        }

    # Repositories

    def _folder(self, repo: str) -> Path:
        return self.folder / "repos" / repo

    def repos(self) -> list[str]:
        return sorted(
            str(path.parent.relative_to(self.folder / "repos"))
            for path in self.folder.glob("repos/*/*/repo.json")
        )

    def create(self, repo: str, private: bool = False) -> None:
        with self.lock:
            if (self._folder(repo) / "repo.json").exists():
                raise Refused(409, "You already created this model repo", url=f"/{repo}")
            files = {
                ".gitattributes": self._file(ATTRIBUTES.encode(), self.add_blob(ATTRIBUTES.encode()), False)
            }
            oid = self._add_commit(repo, None, "initial commit", files)
            state = {"private": private, "gated": False, "refs": {"refs/heads/main": oid}}
            self.save(repo, state)

    def load(self, repo: str) -> dict[str, Any]:
        path = self._folder(repo) / "repo.json"
        if not path.exists():
            raise Refused(404, "Repository not found", "RepoNotFound")
        return json.loads(path.read_bytes())

    def save(self, repo: str, state: dict[str, Any]) -> None:
        self._write_json(self._folder(repo) / "repo.json", state)

    def change(self, repo: str, **settings: Any) -> None:
        with self.lock:
            self.save(repo, self.load(repo) | settings)

    def delete(self, repo: str) -> None:
        with self.lock:
            self.load(repo)
            (self._folder(repo) / "repo.json").unlink()

    # Commits and refs

    def _add_commit(self, repo: str, parent: str | None, title: str, files: dict[str, Any]) -> str:
        commit = {"parent": parent, "title": title, "date": now(), "files": files}
        text = json.dumps([repo, commit, os.urandom(8).hex()])  # two equal commits are two commits
        oid = hashlib.sha1(text.encode()).hexdigest()
        self._write_json(self._folder(repo) / "commits" / oid, commit)
        return oid

    def resolve(self, repo: str, revision: str) -> str:
        refs = self.load(repo)["refs"]
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return refs[name]
        if len(revision) == 40 and (self._folder(repo) / "commits" / revision).is_file():
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, repo: str, oid: str) -> dict[str, Any]:
        return json.loads((self._folder(repo) / "commits" / oid).read_bytes())

    def files(self, repo: str, revision: str = "main") -> dict[str, dict[str, Any]]:
        return self.commit(repo, self.resolve(repo, revision))["files"]

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        return self.blob(self.files(repo, revision)[path]["sha256"])

    def history(self, repo: str, revision: str = "main") -> list[tuple[str, dict[str, Any]]]:
        found, oid = [], self.resolve(repo, revision)
        while oid:
            commit = self.commit(repo, oid)
            found.append((oid, commit))
            oid = commit["parent"]
        return found

    def push(
        self,
        repo: str,
        revision: str,
        title: str,
        added: dict[str, bytes | str],
        deleted: list[str] | None = None,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[str, int | None]:
        """One commit, whole or not at all.

        Args:
            added: Path to content, or to the sha256 of a blob that is here already (LFS).
            deleted: Paths; a folder ends with a slash.
            parent: What the writer believes to be the head.
            pull_request: The commit goes to a new one.
        Returns:
            The commit's oid and the pull request's number.
        """
        with self.lock:
            head = self.resolve(repo, revision)
            if parent is not None and parent != head:
                raise Refused(
                    412, "A commit has happened since. Please refresh and try again.", "PreconditionFailed"
                )
            files = self.commit(repo, head)["files"]
            for path in deleted or []:
                found = [
                    name for name in files if name == path or (path[-1] == "/" and name.startswith(path))
                ]
                if not found:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in found:
                    del files[name]
            for path, content in added.items():
                if isinstance(content, str):
                    if not self.has_blob(content):
                        raise Refused(400, f"LFS pointer of {path} points to a file that was never uploaded")
                    files[path] = self._file(None, content, lfs=True)
                else:
                    files[path] = self._file(content, self.add_blob(content), lfs=False)
            oid = self._add_commit(repo, head, title, files)
            state = self.load(repo)
            number = None
            if pull_request:
                number = 1 + sum(name.startswith("refs/pr/") for name in state["refs"])
                state["refs"][f"refs/pr/{number}"] = oid
            else:
                name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
                if name not in state["refs"]:
                    raise Refused(403, f"{revision} is not a branch")
                state["refs"][name] = oid
            self.save(repo, state)
            return oid, number

    def set_ref(self, repo: str, name: str, oid: str | None, replace: bool = False) -> None:
        """Points a ref to a commit; None deletes it."""
        with self.lock:
            state = self.load(repo)
            if oid is None and name not in state["refs"]:
                raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
            if oid is not None and name in state["refs"] and not replace:
                raise Refused(409, f"Reference already exists: {name}")
            if oid is None:
                del state["refs"][name]
            else:
                state["refs"][name] = oid
            self.save(repo, state)

    # Collections

    def collections(self) -> list[dict[str, Any]]:
        path = self.folder / "collections.json"
        return json.loads(path.read_bytes()) if path.exists() else []

    def save_collections(self, collections: list[dict[str, Any]]) -> None:
        self._write_json(self.folder / "collections.json", collections)
