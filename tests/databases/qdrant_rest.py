"""Qdrant's own local engine behind the routes of its REST interface that the store calls, with an API key.

No package of the registries holds Qdrant's server. So the client for servers is tested over HTTP, and what answers it
is the engine that the client brings along for folders.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models


def answer(engine: QdrantClient, method: str, path: str, body: dict[str, Any]) -> Any:
    """What a server calls `result`; KeyError for a route that is not here."""
    match = re.fullmatch(r"/collections/([\w-]+)(/.*)?", path.partition("?")[0])
    if match is None:
        raise KeyError(path)
    table, route = match[1], (method, match[2] or "")
    if route == ("GET", "/exists"):
        return {"exists": engine.collection_exists(table)}
    if route == ("GET", ""):
        return engine.get_collection(table)
    if route == ("PUT", ""):
        request = models.CreateCollection(**body)
        return engine.create_collection(table, request.vectors, hnsw_config=request.hnsw_config)
    if route == ("PATCH", ""):
        return engine.update_collection(table, metadata=models.UpdateCollection(**body).metadata)
    if route == ("DELETE", ""):
        return engine.delete_collection(table)
    if route == ("PUT", "/points"):
        return engine.upsert(table, models.PointsBatch(**body).batch)
    if route == ("POST", "/points/count"):
        return engine.count(table)
    if route == ("POST", "/points/query"):
        query = models.QueryRequest(**body)
        return engine.query_points(table, query.query, limit=query.limit or 10, query_filter=query.filter)
    raise KeyError(path)


@contextmanager
def running_qdrant(api_key: str) -> Iterator[str]:
    """The URL of a server that refuses requests without the key."""
    engine = QdrantClient(":memory:", force_disable_check_same_thread=True)

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("api-key") != api_key:
                self.send(401, {"status": {"error": "Must provide an API key"}})
                return
            try:
                result = answer(engine, self.command, self.path, json.loads(body or b"{}"))
            except (KeyError, ValueError) as error:
                self.send(400, {"status": {"error": str(error)}})
                return
            self.send(200, {"result": result, "status": "ok", "time": 0.0})

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one

        def send(self, status: int, value: object) -> None:
            content = TypeAdapter(object).dump_json(value)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        engine.close()
