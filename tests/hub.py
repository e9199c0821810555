"""A hub of the tests' own: what the Hugging Face client asks for, over one folder."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(repository: str, folder: Path) -> Iterator[Any]:
    """A server whose only repository has a folder's files; ``asked`` are the paths it was asked.

    ``address`` is for HF_ENDPOINT.
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            server.asked.append((self.command, path))  # type: ignore[attr-defined]
            if path.startswith(f"/api/models/{repository}/tree/"):
                rows = [_leaf(name, content) for name, content in sorted(files.items())]
                self._send(json.dumps(rows).encode(), with_body, "application/json")
                return
            if path.startswith(f"/api/models/{repository}"):
                rows = [_row(name, content) for name, content in sorted(files.items())]
                facts = {"id": repository, "sha": COMMIT, "siblings": rows, "private": False}
                self._send(json.dumps(facts).encode(), with_body, "application/json")
                return
            name = path.rpartition("/")[2]
            if path.startswith(f"/{repository}/resolve/") and name in files:
                self._send_file(files[name], with_body)
                return
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()

        def _send_file(self, content: bytes, with_body: bool) -> None:
            first, status = 0, 200
            asked = self.headers.get("range")
            if asked:
                first, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            self.send_response(status)
            digest = hashlib.sha256(content).hexdigest()
            for name, value in (
                ("x-repo-commit", COMMIT),
                ("etag", f'"{digest}"'),
                ("accept-ranges", "bytes"),
                ("content-length", str(len(content) - first)),
                ("content-range", f"bytes {first}-{len(content) - 1}/{len(content)}"),
            ):
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content[first:])

        def _send(self, content: bytes, with_body: bool, kind: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    server.address = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _leaf(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    leaf: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        leaf["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return leaf


def _row(name: str, content: bytes) -> dict[str, Any]:
    """The same as a model's facts have it."""
    row: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        row["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return row
