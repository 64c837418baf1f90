"""The Hub's HTTP API: from a request to an answer, over a `Store`.

Large files redirect to another origin than the Hub's, as the real Hub redirects to its CDN.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

from tests.hub_store import LFS_SIZE, LFS_SUFFIXES, Refused, Store

LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "other")
TOKENS = {
    "hf_writer": {"name": "writer", "orgs": ["tamzoo"], "role": "write"},
    "hf_reader": {"name": "reader", "orgs": [], "role": "read"},
}


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: dict[str, Any] | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's front matter, after the Hub's published rules."""
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"], []
    if not isinstance(data, dict):
        return ["expected a mapping"], []
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append('"model-index[].name" and "results" are required')
        for result in model.get("results", []):
            wanted = {"task": ["type"], "dataset": ["type", "name"]}
            errors += [
                f'"model-index[].results[].{part}.{key}" is required'
                for part, keys in wanted.items()
                for key in keys
                if not result.get(part, {}).get(key)
            ]
            if not all("type" in metric and "value" in metric for metric in result.get("metrics", [{}])):
                errors.append('"model-index[].results[].metrics[]" need type and value')
    return errors, []


class Routes:
    """One method a route; each takes what its pattern in ROUTES names."""

    store: Store
    tokens: dict[str, dict[str, Any]]
    url: str
    cdn: str

    # What a request may do

    def user_of(self, headers: Any) -> dict[str, Any] | None:
        given = headers.get("Authorization", "")
        if not given:
            return None
        user = self.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _owns(self, user: dict[str, Any] | None, repo: str) -> bool:
        return user is not None and repo.split("/")[0] in (user["name"], *user["orgs"])

    def check_read(self, request: Request, repo: str, content: bool = False) -> dict[str, Any]:
        try:
            state = self.store.load(repo)
        except Refused as refused:
            refused.status = 404 if request.user else 401  # the Hub does not tell a stranger what exists
            raise
        mine = self._owns(request.user, repo)
        if state["private"] and not mine:
            raise Refused(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if state["gated"] and content and not mine:
            raise Refused(403 if request.user else 401, f"Access to model {repo} is restricted", "GatedRepo")
        return state

    def check_write(self, request: Request, repo: str, pull_request: bool = False) -> dict[str, Any]:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if request.user["role"] != "write":
            raise Refused(403, "Forbidden: you must use a write token")
        if not pull_request and not self._owns(request.user, repo):
            raise Refused(403, f"You don't have the rights to write to {repo.split('/')[0]}")
        return request.user

    # Routes

    def answer(self, request: Request) -> Answer:
        try:
            request.user = self.user_of(request.headers)
            for methods, pattern, route in ROUTES:
                found = pattern.fullmatch(request.path)
                if found and request.method in methods:
                    parts = {key: unquote(part) for key, part in found.groupdict().items() if part}
                    return getattr(self, route)(request, **parts)
            raise Refused(404, f"no route {request.method} {request.path}")
        except Refused as refused:
            answer = json_answer({"error": refused.message, **refused.body}, refused.status)
            answer.headers["X-Error-Message"] = refused.message
            if refused.code:
                answer.headers["X-Error-Code"] = refused.code
            return answer

    def whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in request.user["orgs"]]
        auth = {"type": "access_token", "accessToken": {"role": request.user["role"]}}
        return json_answer({"type": "user", "name": request.user["name"], "orgs": orgs, "auth": auth})

    def validate_yaml(self, request: Request) -> Answer:
        errors, warnings = check_card(request.json["content"])
        told = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        return json_answer(told, 400 if errors else 200)

    def create_repo(self, request: Request) -> Answer:
        sent = request.json
        owner = sent.get("organization") or (request.user or {}).get("name")
        repo = f"{owner}/{sent['name']}"
        self.check_write(request, repo)
        try:
            self.store.create(repo, sent.get("visibility") == "private" or bool(sent.get("private")))
        except Refused as refused:
            refused.body["url"] = f"{self.url}/{repo}"
            raise
        return json_answer({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        state = self.check_read(request, repo)
        oid = self.store.resolve(repo, revision)
        commit = self.store.commit(repo, oid)
        siblings = []
        for path, file in commit["files"].items():
            row: dict[str, Any] = {"rfilename": path}
            if "blobs" in request.query:
                row |= {"size": file["size"], "blobId": file["oid"]}
                if file["lfs"]:
                    row["lfs"] = {
                        "size": file["size"],
                        "sha256": file["sha256"],
                        "pointerSize": file["pointer_size"],
                    }
            siblings.append(row)
        return json_answer(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": oid,
                "private": state["private"],
                "gated": state["gated"],
                "lastModified": commit["date"],
                "tags": [],
                "siblings": siblings,
            }
        )

    def _entry(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["lfs"]:
            entry["lfs"] = {
                "oid": file["sha256"],
                "size": file["size"],
                "pointerSize": file["pointer_size"],
            }
        return entry

    def tree(self, request: Request, repo: str, revision: str, folder: str = "") -> Answer:
        self.check_read(request, repo)
        inside = f"{folder}/" if folder else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for path, file in self.store.files(repo, revision).items():
            if not path.startswith(inside):
                continue
            parts = path.removeprefix(inside).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders.add(inside + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                entries.append(self._entry(path, file))
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        return json_answer(sorted(entries, key=lambda entry: entry["path"]))

    def refs(self, request: Request, repo: str) -> Answer:
        state = self.check_read(request, repo)

        def rows(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in state["refs"].items()
                if ref.startswith(prefix)
            ]

        return json_answer({"branches": rows("refs/heads/"), "tags": rows("refs/tags/"), "converts": []})

    def tag(self, request: Request, repo: str, name: str) -> Answer:
        self.check_write(request, repo)
        self.store.set_ref(repo, f"refs/tags/{request.json['tag']}", self.store.resolve(repo, name))
        return Answer()

    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        self.check_read(request, repo)
        self.check_write(request, repo, "create_pr" in request.query)
        present = self.store.files(repo, revision)
        rows = []
        for file in request.json["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            row = {
                "path": file["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
            }
            if old := present.get(file["path"]):
                row["oid"] = old["sha256"] if old["lfs"] else old["oid"]
            rows.append(row)
        return json_answer({"files": rows})

    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        self.check_read(request, repo)
        to_pull_request = "create_pr" in request.query
        self.check_write(request, repo, to_pull_request)
        header: dict[str, Any] = {}
        added: dict[str, bytes | str] = {}
        deleted: list[str] = []
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                added[value["path"]] = value["oid"]
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
        oid, number = self.store.push(
            repo,
            revision,
            header["summary"],
            added,
            deleted,
            header.get("parentCommit"),
            to_pull_request,
        )
        told = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}
        if number:
            told["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
        return json_answer(told)

    def lfs_batch(self, request: Request, repo: str) -> Answer:
        self.check_read(request, repo)
        self.check_write(request, repo, pull_request=True)  # a pull request's files come this way too
        rows = []
        for item in request.json["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not self.store.has_blob(item["oid"], item["size"]):
                row["actions"] = {
                    "upload": {"href": f"{self.cdn}/{item['oid']}"},
                    "verify": {"href": f"{self.url}/lfs/verify"},
                }
            rows.append(row)
        return json_answer({"transfer": "basic", "objects": rows})

    def lfs_put(self, request: Request, sha256: str) -> Answer:
        self.store.add_blob(request.body, expected=sha256)
        return Answer()

    def lfs_verify(self, request: Request) -> Answer:
        if not self.store.has_blob(request.json["oid"], request.json["size"]):
            raise Refused(400, "the object is not here, or of another size")
        return Answer()

    def cdn_get(self, request: Request, sha256: str) -> Answer:
        return self._ranged(request, self.store.blob(sha256), {"ETag": f'"{sha256}"'})

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        self.check_read(request, repo, content=True)
        oid = self.store.resolve(repo, revision)
        file = self.store.commit(repo, oid)["files"].get(path)
        headers = {"X-Repo-Commit": oid}
        if file is None:
            answer = json_answer({"error": "Entry not found"}, 404)
            answer.headers |= headers | {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
            }
            return answer
        if file["lfs"]:
            linked = {"X-Linked-ETag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
            return Answer(302, b"", headers | linked | {"Location": f"{self.cdn}/{file['sha256']}"})
        return self._ranged(request, self.store.blob(file["sha256"]), headers | {"ETag": f'"{file["oid"]}"'})

    def _ranged(self, request: Request, content: bytes, headers: dict[str, str]) -> Answer:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not found:
            return Answer(200, content, headers)
        first = int(found[1])
        last = min(int(found[2] or len(content) - 1), len(content) - 1)
        headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Answer(206, content[first : last + 1], headers)

    def merge(self, request: Request, repo: str, number: str) -> Answer:
        self.check_write(request, repo)
        head = self.store.resolve(repo, f"refs/pr/{number}")
        self.store.set_ref(repo, "refs/heads/main", head, replace=True)
        return json_answer({})

    def collections(self, request: Request) -> Answer:
        with self.store.lock:
            rows = self.store.collections()
            if request.method == "GET":
                owners = request.query.get("owner", [])
                rows = [row for row in rows if not owners or row["owner"] in owners]
                return json_answer(
                    [{key: value for key, value in row.items() if key != "position"} for row in rows]
                )
            sent = request.json
            self.check_write(request, f"{sent['namespace']}/")
            slug = re.sub(r"[^a-z0-9]+", "-", sent["title"].lower()).strip("-")
            slug = f"{sent['namespace']}/{slug}-{'0' * 24}"
            if any(row["slug"] == slug for row in rows):
                raise Refused(409, "This collection already exists", slug=slug)
            row = {
                "slug": slug,
                "title": sent["title"],
                "description": sent.get("description"),
                "owner": sent["namespace"],
                "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": len(rows),
                "private": sent["private"],
                "theme": "green",
                "upvotes": 0,
            }
            self.store.save_collections([*rows, row])
            return json_answer(row)

    def collection(self, request: Request, slug: str, items: str = "") -> Answer:
        with self.store.lock:
            rows = self.store.collections()
            row = next((row for row in rows if row["slug"] == slug), None)
            if row is None:
                raise Refused(404, f"no collection {slug}")
            if items:
                self.check_write(request, slug)
                item = request.json["item"]
                self.check_read(request, item["id"])
                if any(old["id"] == item["id"] for old in row["items"]):
                    raise Refused(409, "Item already in collection")
                number = len(row["items"])
                row["items"].append({"_id": f"{number:024d}", **item, "position": number})
                self.store.save_collections(rows)
            return json_answer(row)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/models/{_REPO}"
ROUTES = [
    (methods.split(), re.compile(pattern), route)
    for methods, pattern, route in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET POST", r"/api/collections", "collections"),
        ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
        ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/(?P<items>items)", "collection"),
        ("GET", _API, "info"),
        ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("GET", rf"{_API}/refs", "refs"),
        ("POST", rf"{_API}/tag/(?P<name>[^/]+)", "tag"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{_API}/discussions/(?P<number>\d+)/merge", "merge"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/cdn/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
        ("GET HEAD", r"/cdn/(?P<sha256>[0-9a-f]{64})", "cdn_get"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]
