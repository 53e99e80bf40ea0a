"""A web server for the tests of downloads."""

import http.server
import threading
from typing import ClassVar

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "slow-status": (b"HTTP/1.1 200 ", b"O"),
    "slow-headers": (OK, b"X: y\r\n"),
    "slow-body": (OK + b"Content-Length: 1000000\r\n\r\n", b"a"),
    "slow-size": (CHUNKS, b"0"),
    "slow-extension": (CHUNKS + b"5;", b"x"),
    "slow-chunk": (CHUNKS + b"fffff\r\n", b"a"),
    "slow-trailers": (CHUNKS + b"0\r\n", b"X: y\r\n"),
}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; a path with "hangs" is never answered, one with "half" is cut short, and one
    with "slow" sends a part of its answer one byte at a time, without an end."""

    files: ClassVar[dict[str, bytes]] = {}
    released = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "hangs" in self.path:
            self.released.wait(30)
            return
        for name, (start, rest) in SLOW.items():
            if name in self.path and self.command == "GET":
                self.wfile.write(start)
                while not self.released.wait(0.05):
                    self.wfile.write(rest)
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
