"""A stand-in for Google Cloud Storage: objects in memory behind the JSON API that its clients use.

Source of the API: https://cloud.google.com/storage/docs/json_api/v1 (objects: get, insert, list,
delete; preconditions).
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)")
_LIST = re.compile(r"/storage/v1/b/[^/]+/o")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/[^/]+/o")


class Storage:
    """The objects of one bucket.

    Attributes:
        objects: generation and content of each, by name.
    """

    def __init__(self):
        """Makes an empty bucket."""
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.sessions: dict[str, tuple[str, bytes]] = {}
        self._generations = itertools.count(1000)
        self._lock = threading.Lock()

    def write(self, name: str, content: bytes | None, expected: str | None) -> bool:
        """Writes or deletes an object if it has the expected generation, 0 for none."""
        with self._lock:
            generation, _ = self.objects.get(name, (0, b""))
            if expected is not None and int(expected) != generation:
                return False
            if content is None:
                self.objects.pop(name, None)
            else:
                self.objects[name] = next(self._generations), content
            return True

    def describe(self, name: str) -> dict:
        """Returns an object's metadata."""
        generation, content = self.objects[name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "name": name,
            "bucket": "bucket",
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": time,
            "updated": time,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: Storage

    def log_message(self, *_) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = _query(url.query)
        if match := _OBJECT.fullmatch(url.path):
            self._get(unquote(match[1]), query, "download" in url.path)
        elif _LIST.fullmatch(url.path):
            self._list(query)
        else:
            self._json(200, {"name": "bucket"})

    def _get(self, name: str, query: dict, is_download: bool) -> None:
        if name not in self.storage.objects:
            self._json(404, {"error": {"code": 404, "message": "no such object"}})
            return
        generation, content = self.storage.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304, b"")
            return
        if query.get("alt") != "media" and not is_download:
            self._json(200, self.storage.describe(name))
            return
        headers = {"x-goog-generation": str(generation)}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            start = int(match[1])
            end = min(int(match[2]) + 1, size) if match[2] else size
            content = content[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            status = 206
        self._answer(status, content, headers)

    def _list(self, query: dict) -> None:
        prefix = query.get("prefix", "")
        begin = query.get("startOffset", "")
        end = query.get("endOffset")
        delimiter = query.get("delimiter")
        items = []
        prefixes = set()
        for name in sorted(self.storage.objects):
            if not name.startswith(prefix) or name < begin or (end and name >= end):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.storage.describe(name))
        self._json(200, {"items": items, "prefixes": sorted(prefixes)})

    def do_POST(self) -> None:
        url = urlparse(self.path)
        query = _query(url.query)
        body = self._body()
        if not _UPLOAD.fullmatch(url.path):
            self._json(404, {"error": {"code": 404, "message": url.path}})
        elif "upload_id" in query:
            name, before = self.storage.sessions[query["upload_id"]]
            self._resume(query["upload_id"], name, before + body)
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            session = str(len(self.storage.sessions))
            self.storage.sessions[session] = (name, b"")
            where = f"http://{self.headers['Host']}{url.path}?upload_id={session}"
            self._answer(200, b"", {"Location": where})
        else:
            name = query.get("name")
            if query["uploadType"] == "multipart":
                kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n"
                parts = message_from_bytes(kind.encode() + body).get_payload()
                name = json.loads(parts[0].get_payload(decode=True))["name"]
                body = parts[1].get_payload(decode=True)
            self._insert(name, body, query.get("ifGenerationMatch"))

    do_PUT = do_POST

    def _resume(self, session: str, name: str, content: bytes) -> None:
        self.storage.sessions[session] = (name, content)
        if self.headers.get("Content-Range", "").endswith("/*"):
            self._answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self._insert(name, content, None)

    def _insert(self, name: str, content: bytes, expected: str | None) -> None:
        if self.storage.write(name, content, expected):
            self._json(200, self.storage.describe(name))
        else:
            self._json(412, {"error": {"code": 412, "message": "conditionNotMet"}})

    def do_DELETE(self) -> None:
        url = urlparse(self.path)
        name = unquote(_OBJECT.fullmatch(url.path)[1])
        expected = _query(url.query).get("ifGenerationMatch")
        found = name in self.storage.objects
        written = self.storage.write(name, None, expected)
        self._answer(204 if written and found else 412 if not written else 404, b"")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, status: int, value: dict) -> None:
        self._answer(
            status, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )

    def _answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """Says nothing of clients that have gone."""


def _query(text: str) -> dict[str, str]:
    return {
        name: values[0]
        for name, values in parse_qs(text, keep_blank_values=True).items()
    }


@contextlib.contextmanager
def serve_storage() -> Iterator[tuple[Storage, dict[str, str]]]:
    """Serves an empty bucket, "bucket".

    Yields:
        Its objects, and the environment in which programs find them.
    """
    storage = Storage()
    handler = type("Handler", (_Handler,), {"storage": storage})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        # TensorStore's, with a token that it does not have to ask for; gcsfs'.
        "TENSORSTORE_GCS_HTTP_URL": place,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "STORAGE_EMULATOR_HOST": place,
    }
    try:
        yield storage, environment
    finally:
        server.shutdown()
        server.server_close()
