"""The server of the page: on this machine alone, three paths, nothing that can be changed."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit
from zlib import crc32

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ember_mlx.plots.style import THEMES
from ember_mlx.shared.errors import InputError
from ember_mlx.watch.following import RunFile
from ember_mlx.watch.view import PANELS, view

__all__ = ["HOST", "PORT", "PageServer"]

HOST, PORT = "127.0.0.1", 8700
NEXT_PORTS = 20  # that are tried where none was asked for
FOLDER = Path(__file__).parent
# The browser runs no script but the page's own file, and asks nobody else.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"


class PageServer(ThreadingHTTPServer):
    """Serves the page of ``runs`` and, as JSON, what there is of them now.

    Args:
        runs: Read anew at each request.
        port (int, optional): 0 for any that is free; None for PORT, or the next one that is free.

    Raises:
        InputError: when the port, or each of those that are tried, is taken.
    """

    daemon_threads = True

    def __init__(self, runs: list[RunFile], port: int | None = None):
        self.runs = runs
        self._lock, self._shown, self._state = Lock(), (None, b""), "{}"
        wanted = range(PORT, PORT + NEXT_PORTS) if port is None else [port]
        for each in wanted:
            try:
                super().__init__((HOST, each), _Handler)
                break
            except OSError as error:
                reason = error.strerror
        else:
            tried = f"--port {port}" if port is not None else f"ports {wanted[0]} to {wanted[-1]}"
            raise InputError(f"{tried}: cannot be served ({reason}); give another one, or --port 0 for any")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> bytes:
        """The page itself. What the runs hold comes later, and a script puts it in as text."""
        environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
        page = environment.get_template("page.html.jinja")
        return page.render(paths=[str(run.path) for run in self.runs]).encode(errors="replace")

    def style(self) -> bytes:
        """The page's looks, with the colours that all pictures have."""
        colours = []
        for theme in THEMES.values():
            lines = "".join(f" --line{i}: {colour};" for i, colour in enumerate(theme.lines))
            root = f":root {{ --background: {theme.background}; --text: {theme.text}; --grid: {theme.grid};{lines} }}"
            colours.append(f"@media (prefers-color-scheme: {theme.name}) {{ {root} }}")
        return "\n".join([*colours, (FOLDER / "page.css").read_text()]).encode()

    def script(self) -> bytes:
        panels = [dict(zip(("key", "title", "unit", "scale"), panel, strict=False)) for panel in PANELS]
        return f"const PANELS = {json.dumps(panels)};\n{(FOLDER / 'page.js').read_text()}".encode()

    def shown(self) -> tuple[str, bytes]:
        """A tag that changes with the runs, and JSON of what there is of them."""
        with self._lock:
            for run in self.runs:
                run.trouble = ""
                try:
                    run.read_more()
                except OSError as error:
                    run.trouble = error.strerror or str(error)
            state = [(run.changes, run.state, run.trouble) for run in self.runs]
            if state != self._state:
                body = json.dumps(view(self.runs)).encode()  # ASCII: half a surrogate cannot break it
                self._state, self._shown = state, (f"{crc32(body):08x}", body)
            return self._shown

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that closes its page in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        # A page elsewhere could give a name of its own the address 127.0.0.1, and read the runs.
        if _host(self.headers.get("Host", "")) not in (HOST, "localhost"):
            return self._send(403, "text/plain", b"only for this machine")
        path = urlsplit(self.path)
        if path.path == "/":
            return self._send(200, "text/html; charset=utf-8", self.server.page())
        if path.path == "/page.css":
            return self._send(200, "text/css; charset=utf-8", self.server.style())
        if path.path == "/page.js":
            return self._send(200, "text/javascript; charset=utf-8", self.server.script())
        if path.path != "/runs":
            return self._send(404, "text/plain", b"not here")
        tag, body = self.server.shown()
        if parse_qs(path.query).get("have") == [tag]:
            return self._send(204, "application/json", b"")
        return self._send(200, "application/json", body, tag)

    def _send(self, status, kind, body, tag=""):
        self.send_response(status)
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "Content-Security-Policy": POLICY}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        headers |= {"ETag": tag} if tag else {}
        headers |= {"Content-Length": str(len(body))} if status != 204 else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """A line a second is no news."""


def _host(header):
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:  # half an IPv6 address
        return None
