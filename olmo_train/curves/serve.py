"""A page of live runs on this computer: the browser asks for new data every few seconds."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from olmo_train.curves import page
from olmo_train.curves.panels import Curves, View
from olmo_train.curves.runs import Run
from olmo_train.errors import ConfigError, DataError, reason

HOST = "127.0.0.1"  # never another computer's to see


def serve(choose: Callable[[], tuple[list[Run], list[Curves], View]], port: int, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `choose` reads the runs again for each request. Port 0 is a free one.

    Raises ConfigError when the port is in use, and what `choose` raises for the first time.
    """
    choose()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kinds = {"/": "text/html", "/data": "application/json"}
            if self.path not in kinds:
                return self.send_error(404)
            try:
                text = page.page_text(*choose(), live=True) if self.path == "/" else page.data_text(*choose())
            except (ConfigError, DataError) as problem:
                return self.send_error(503, str(problem))
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kinds[self.path]}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not printed."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as problem:
        raise ConfigError(
            "--serve", f"port {port} cannot be used: {reason(problem)}; name another, or none for a free one"
        ) from problem
    with server:
        announce(f"http://localhost:{server.server_address[1]}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
