"""A web server for the tests of downloads."""

import http.server
import threading
from typing import ClassVar


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; a path with "hangs" is never answered, one with "half" is cut short."""

    files: ClassVar[dict[str, bytes]] = {}
    released = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "hangs" in self.path:
            self.released.wait(30)
            return
        body = self.files.get(self.path.rsplit("/", 1)[-1])
        self.send_response(200 if body is not None else 404)
        body = body or b"<html>not here</html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if "half" in self.path else body)

    def log_message(self, *_: object) -> None:
        pass
