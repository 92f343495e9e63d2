"""A server that breaks off or waits in the middle of what it sends."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """The contents at their addresses; behind its first part the server does what `then` says."""

    def do_HEAD(self):
        self.begin()

    def do_GET(self):
        part, goes_on = self.begin()
        if goes_on:
            self.wfile.write(part)
            return
        self.wfile.write(part[: len(part) // 2])
        while self.server.then == "wait":
            time.sleep(0.01)

    def begin(self):
        """Answer; returns what is asked for, and whether it is sent as a whole."""
        content, asked = self.server.contents[self.path], self.headers.get("Range")
        first, last = asked.removeprefix("bytes=").split("-") if asked else (0, "")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        return part, self.server.then == "go on" or not int(first)

    def log_message(self, *_):
        pass


@contextmanager
def serving(contents):
    """A server of bytes by their paths, whose `then` is "go on", "break off" or "wait"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.contents, server.then = contents, "go on"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.then = "break off"
        server.shutdown()
        server.server_close()
