"""A Hugging Face hub on this machine: the endpoints that a download touches, and their faults."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves ``repos[owner/name] = {file: bytes}`` and records what was asked for.

    Attributes:
        requests: ``(method, file, first byte)`` of every file request.
        status: repositories that answer with an error: ``{repo: (code, X-Error-Code)}``.
        cut: ``{file: [bytes, …]}``, to break off after that many bytes, once for each entry.
        down: hang up on everyone.
        cdn: send everyone who wants a file to another host, as the real hub does with large ones.
        tokens: ``(host, Authorization)`` of every request for a file's content.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.status: dict[str, tuple[int, str]] = {}
        self.cut: dict[str, list[int]] = {}
        self.down = self.cdn = False
        self.tokens: list[tuple[str, str]] = []
        self.commit = COMMIT
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        return sorted({file for method, file, _ in self.requests if method == "GET"})

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        if self.down:
            request.close_connection = True
            return
        path = unquote(urlsplit(request.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = match[1], match[2] or "main"
            if not self.refused(request, repo, revision):
                siblings = [
                    {"rfilename": file, "size": len(data), "blobId": "b"}
                    for file, data in self.repos[repo].items()
                ]
                reply = {"id": repo, "modelId": repo, "sha": self.commit, "siblings": siblings}
                reply |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
                self.send(request, 200, json.dumps(reply).encode(), {}, with_body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, file = match.groups()
            if not self.refused(request, repo, revision):
                self.send_file(request, repo, file, with_body)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self.send_file(request, match[1], match[2], with_body, is_cdn=True)
        else:
            self.send(request, 404, b"", {}, with_body)

    def refused(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> bool:
        code, name = self.status.get(repo, (0, ""))
        if not code and repo not in self.repos:
            code, name = 404, "RepoNotFound"
        if not code and revision not in ("main", self.commit):
            code, name = 404, "RevisionNotFound"
        if code:
            self.send(request, code, b"", {"X-Error-Code": name} if name else {}, False)
        return bool(code)

    def send_file(
        self,
        request: BaseHTTPRequestHandler,
        repo: str,
        file: str,
        with_body: bool,
        is_cdn: bool = False,
    ) -> None:
        data = self.repos[repo].get(file)
        if data is None:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, False)
            return
        digest = hashlib.sha256(data).hexdigest()
        if self.cdn and not is_cdn:
            headers = {
                "X-Repo-Commit": self.commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{file}",
            }
            self.send(request, 302, b"", headers, False)
            return
        if with_body:
            host, token = (request.headers.get(name, "") for name in ("Host", "Authorization"))
            self.tokens.append((host.partition(":")[0], token))
        first = 0
        if found := re.match(r"bytes=(\d+)-", request.headers.get("Range", "")):
            first = int(found[1])
        self.requests.append((request.command, file, first))
        headers = {
            "X-Repo-Commit": self.commit,
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        body = data[first:]
        if with_body and self.cut.get(file):
            stop = self.cut[file].pop(0)
            self.send(request, 206 if first else 200, body, headers, True, stop=stop)
            request.close_connection = True
            return
        self.send(request, 206 if first else 200, body, headers, with_body)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler,
        code: int,
        body: bytes,
        headers: dict[str, str],
        with_body: bool,
        stop: int | None = None,
    ) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body if stop is None else body[:stop])
            request.wfile.flush()
