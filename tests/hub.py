"""A small Hugging Face Hub on the loopback interface, so that the real client is what the tests run.

It serves folders as repositories and refuses the way the real one does (status and X-Error-Code).
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`with Hub({"owner/name": folder}) as hub:`; the attributes may change while it runs."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.gate: str | None = None  # "gated": files want a token in `allowed`; "fine-grained": a right is missing
        self.allowed: set[str] = set()  # tokens whose account has accepted the license
        self.known: set[str] = set()  # tokens that exist
        self.cut: tuple[str, int] | None = None  # (file, n): connections break after byte n of it ...
        self.cuts = 1_000_000  # ... so many times
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range)
        self.tokens: set[str] = set()  # tokens that were sent to us

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def connect(self, monkeypatch, cache: Path) -> None:
        """Point this process's Hub client here, with an empty cache and no saved login."""
        from huggingface_hub import constants, hf_api

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "no-tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The client waits seconds between its tries; there is nothing to wait for here.
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token:
            self.hub.tokens.add(token)
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        if match is None:
            return self._refuse(404, "", f"{path} is not served here")
        repo_id, kind, _, name = match.groups()
        if repo_id not in self.hub.repositories:
            # The real Hub does not tell a stranger whether a repository exists.
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        folder = self.hub.repositories[repo_id]
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        if kind == "resolve":
            return self._file(repo_id, files, name, token)
        if kind == "tree":
            return self._json(
                [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _etag(f)} for n, f in files.items()]
            )
        siblings = [{"rfilename": n} for n in files]
        self._json(
            {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        )

    def _file(self, repo_id: str, files: dict[str, Path], name: str, token: str) -> None:
        if self.hub.gate == "fine-grained":
            return self._refuse(403, "", "Please enable access to public gated repositories in your fine-grained token")
        if self.hub.gate == "gated" and token not in self.hub.allowed:
            if token and token not in self.hub.known:
                return self._refuse(401, "", "Invalid credentials in Authorization header")
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": COMMIT})
        content = files[name].read_bytes()
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        headers = {
            "Content-Length": str(len(content) - start),
            "ETag": f'"{_etag(files[name])}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{_etag(files[name])}"',
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, headers)
        if self.command == "HEAD":
            return
        end = len(content)
        if self.hub.cut is not None and self.hub.cut[0] == name and self.hub.cuts > 0:
            self.hub.cuts -= 1
            end = self.hub.cut[1]
            self.close_connection = True
        self.wfile.write(content[start:end])

    def _json(self, value) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code} if code else {}
        self._head(status, {"X-Error-Message": message, "Content-Length": "0", **extra, **(headers or {})})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
