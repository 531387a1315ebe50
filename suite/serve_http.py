"""A small HTTP front of `adaptsuite.serve.Server`: predict, list, load, unload, health, metrics.

    POST   /adapters/{id}/predict   the file itself as body -> {"adapter", "label", "scores"}
    POST   /predict                 {"adapter": id, "file": base64} -> the same
    GET    /adapters                what is loaded, and what could be
    PUT    /adapters/{id}           loads the folder of that name;  DELETE unloads it
    GET    /health, /metrics        (Prometheus' text)

Only folders directly below one root can be loaded. Errors are {"error": one line}: 404 for an unknown adapter, 409 for
one that does not fit, 413 for a body over the limit, 422 for a file that cannot be used, 503 when too many wait, 504
when an answer takes too long. There is no encryption and nobody is asked who they are: it binds to this machine.
"""

import asyncio
import base64
import binascii
import importlib.util
import json
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptsuite.commands import adapter_folder
from adaptsuite.errors import AdapterError, DataError, ResourceError, UsageError
from adaptsuite.serve import Server

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")  # no slash, no dots in front or in a row
STATUS = {LookupError: 404, TimeoutError: 504, AdapterError: 409, DataError: 422, UsageError: 422, ResourceError: 503}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 16 * 2**20
    pixels: int = 25_000_000  # a file of a few kilobytes can unpack to gigabytes
    upload_s: float = 30.0  # until the body is here
    answer_s: float = 30.0  # from then on


class Refused(Exception):
    """A request that is answered with this status and line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


def require() -> None:
    """Raises UsageError with the command that installs what is missing."""
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        raise UsageError("serving over HTTP needs fastapi and uvicorn: pip install 'adaptsuite[serve]'")


def create_app(server: Server, root: str | Path, limits: Limits | None = None) -> Any:
    """The ASGI application. root: folder whose subfolders are the adapters. Raises UsageError without fastapi."""
    require()
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse

    app, root, limits = FastAPI(title="adaptsuite"), Path(root).resolve(), limits or Limits()
    front = Front(server, root, limits)

    async def answered(call: Callable[..., Any], *args: Any) -> Any:
        """The call in a thread of its own, its errors as JSON."""
        try:
            return JSONResponse(await asyncio.to_thread(call, *args))
        except Exception as error:
            status, line = front.error(error)
            return JSONResponse({"error": line}, status)

    @app.get("/health")
    def health() -> Any:
        return {"status": "ok", "adapters": len(server.adapters()), "waiting": server.waiting}

    @app.get("/metrics")
    def metrics() -> Any:
        return PlainTextResponse(front.metrics())

    @app.get("/adapters")
    async def adapters() -> Any:
        return await answered(front.list)

    @app.put("/adapters/{name}")
    async def load(name: str) -> Any:
        return await answered(front.load, name)

    @app.delete("/adapters/{name}")
    async def unload(name: str) -> Any:
        return await answered(front.unload, name)

    @app.post("/adapters/{name}/predict")
    async def predict_file(name: str, request: Request) -> Any:
        return await answered(front.predict, name, await request.body())

    @app.post("/predict")
    async def predict(request: Request) -> Any:
        return await answered(front.predict_json, await request.body())

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> Any:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    app.add_middleware(Bodies, limits=limits, count=front.count)
    return app


class Front:
    """What the routes do."""

    def __init__(self, server: Server, root: Path, limits: Limits):
        self.server, self.root, self.limits = server, root, limits
        self.statuses: Counter[int] = Counter()
        self.seconds = 0.0
        self._lock = threading.Lock()

    def folder(self, name: str) -> Path:
        """Of an adapter below the root; LookupError for every other name."""
        folder = self.root / name
        if not ID.fullmatch(name) or folder.is_symlink() or not (adapter_folder(folder) / "adapter.json").is_file():
            raise LookupError(f"no adapter {name[:80]!r} here")
        return folder

    def list(self) -> dict[str, Any]:
        loaded = [
            {"id": a.name, "method": a.record.method.name, "labels": a.labels, "temperature": a.record.temperature}
            for a in self.server.adapters()
        ]
        names = sorted(p.name for p in self.root.iterdir() if (adapter_folder(p) / "adapter.json").is_file())
        return {"loaded": loaded, "available": [n for n in names if n not in {a["id"] for a in loaded}]}

    def load(self, name: str) -> dict[str, Any]:
        found = self.server.load(name, self.folder(name))
        return {"id": name, "method": found.record.method.name, "labels": found.labels}

    def unload(self, name: str) -> dict[str, Any]:
        self.server.unload(name)
        return {"id": name}

    def predict_json(self, body: bytes) -> dict[str, Any]:
        try:
            given = json.loads(body)
            name, file = given["adapter"], base64.b64decode(given["file"], validate=True)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
            raise Refused(400, 'the body must be JSON: {"adapter": id, "file": base64 of the file}') from None
        if not isinstance(name, str):
            raise Refused(400, "adapter must be an id")
        return self.predict(name, file)

    def predict(self, name: str, file: bytes) -> dict[str, Any]:
        start = time.monotonic()
        self.server.adapter(name)
        with tempfile.TemporaryDirectory(prefix="adaptsuite-") as folder:
            path = Path(folder) / "upload"
            path.write_bytes(file)
            try:
                header = self.server.domain.header(path)
                pixels = getattr(header, "width", 0) * getattr(header, "height", 0)
                if pixels > self.limits.pixels:
                    raise DataError(f"{path}: {pixels:,} pixels, at most {self.limits.pixels:,} are taken")
                found = self.server.predict(name, path, self.limits.answer_s)
            except DataError as error:
                raise DataError(str(error).replace(str(path), "the file")) from error
        with self._lock:
            self.seconds += time.monotonic() - start
        return {"adapter": name, **found}

    def error(self, error: Exception) -> tuple[int, str]:
        """Status and line. Of an error that nobody foresaw the kind alone: its words may tell what they should not."""
        if isinstance(error, Refused):
            return error.status, str(error)
        for kind, status in STATUS.items():
            if isinstance(error, kind):
                line = str(error.args[0] if error.args else "the answer took too long").replace(str(self.root), "")
                return status, " ".join(line.split())
        return 500, f"failed: {type(error).__name__}"

    def count(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1

    def metrics(self) -> str:
        server = self.server
        values = {
            "adapters": len(server.adapters()), "waiting": server.waiting, "batches_total": server.batches,
            "items_total": server.items, "answer_seconds_total": round(self.seconds, 6),
        }  # fmt: skip
        lines = [f"adaptsuite_{name} {value}" for name, value in values.items()]
        with self._lock:
            lines += [f'adaptsuite_requests_total{{status="{k}"}} {v}' for k, v in sorted(self.statuses.items())]
        return "\n".join(lines) + "\n"


class Bodies:
    """ASGI middleware: takes in a request's whole body before anything else runs, within limits, and counts answers."""

    def __init__(self, app: Any, limits: Limits, count: Callable[[int], None]):
        self.app, self.limits, self.count = app, limits, count

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.count(message["status"])
            await send(message)

        try:
            body = await asyncio.wait_for(self._body(dict(scope["headers"]), receive), self.limits.upload_s)
        except (Refused, TimeoutError) as error:
            status = getattr(error, "status", 408)
            return await _refuse(counted, status, str(error) or "the body took too long")
        if body is None:  # the client has gone
            return None
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict:
            return next(messages, None) or await receive()

        return await self.app(scope, again, counted)

    async def _body(self, headers: dict[bytes, bytes], receive: Callable) -> bytes | None:
        most = self.limits.body_bytes
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "compressed bodies are not taken")
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            raise Refused(413, f"a body of {said[:20].decode('latin-1')} bytes, at most {most:,} are taken")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > most:
                raise Refused(413, f"a body of more than {most:,} bytes is not taken")
        return b"".join(parts)


async def _refuse(send: Callable, status: int, line: str) -> None:
    body = json.dumps({"error": line}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # what is left of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run(server: Server, root: str | Path, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None):
    """Serves until SIGINT or SIGTERM. Raises ResourceError for a port that is taken."""
    import socket

    app = create_app(server, root, limits)
    import uvicorn

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((host, port))
        except OSError as error:
            raise ResourceError(f"port {port} of {host} cannot be taken: {os.strerror(error.errno or 0)}") from error
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=10, limit_concurrency=512, lifespan="off")
        uvicorn.Server(config).run(sockets=[own])
