"""A stand-in for W&B's server on this machine: as much of its GraphQL, file_stream and upload calls as the client needs.

    with Server("works") as server:
        ...                                 # WANDB_BASE_URL=server.url
        server.history                      # {run id: [row, ...]} as it arrived

`refuses` answers 401 to everything, `hangs` accepts and never answers, `dies` works until a run's history arrives and
is gone from then on.
"""

import contextlib
import gzip
import http.server
import json
import threading
from collections import defaultdict


class Server:
    def __init__(self, manner: str):
        self.manner = manner
        self.history: dict[str, list[dict]] = defaultdict(list)
        self.runs: dict[str, dict] = {}  # {run id: what the client sent about it}
        self.uploaded: dict[str, bytes] = {}
        self.requests = 0
        self.over = threading.Event()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        with contextlib.suppress(OSError):
            self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: str, variables: dict) -> dict:
        """The data of a GraphQL answer."""
        operation = query.split("(")[0].split("{")[0].split()[1]
        if operation == "RunResumeStatus":
            return {
                "model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": self._bucket(variables["name"])}
            }
        if operation == "UpsertBucket":
            known = variables["name"] in self.runs
            self.runs.setdefault(variables["name"], {}).update({key: v for key, v in variables.items() if v is not None})
            project = {"id": "p", "name": "olmo-train", "entity": {"id": "e", "name": "e"}}
            run, rows = variables["name"], len(self.history[variables["name"]])
            bucket = {"id": "b", "name": run, "displayName": run, "description": None, "config": "{}", "sweepName": None,
                      "historyLineCount": rows, "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, run: str) -> dict | None:
        rows = self.history.get(run)
        if not rows:
            return None
        return {"id": "b", "name": run, "summaryMetrics": "{}", "displayName": run, "logLineCount": 0, "config": "{}", "tags": [],
                "historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(rows[-1])]), "eventsLineCount": 0,
                "eventsTail": "[]", "notes": None, "wandbConfig": '{"t": 1}'}  # fmt: skip

    def take(self, run: str, body: dict) -> None:
        """Rows of a run's file_stream."""
        for row in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.history[run].append(json.loads(row))


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: Server

    def do_POST(self) -> None:
        stub, body = self.server_of, self._body()
        stub.requests += 1
        if stub.manner == "hangs":
            stub.over.wait()
            return
        if stub.manner == "refuses":
            self._send(401, {"errors": [{"message": "user is not logged in"}]})
        elif self.path == "/graphql":
            question = json.loads(body)
            self._send(200, {"data": stub.answer(question["query"], question.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            stub.take(self.path.split("/")[-2], json.loads(body))
            if stub.manner == "dies" and any(stub.history.values()):
                threading.Thread(target=stub.stop, daemon=True).start()
                self.close_connection = True
                return
            self._send(200, {"limits": {}})
        else:
            self._send(200, {})

    def do_PUT(self) -> None:
        self.server_of.uploaded[self.path.removeprefix("/upload/")] = self._body()
        self._send(200, {})

    do_GET = do_POST

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, code: int, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *message) -> None:
        """Silent."""
