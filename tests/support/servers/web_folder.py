"""A real web server of one folder, which can redirect."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebFolder:
    """A folder's server. ``asked`` lists the requested paths, ``redirect_to`` a target for all."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.redirect_to: str | None = None


@contextmanager
def web_folder(folder: Path) -> Iterator[WebFolder]:
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.asked.append(self.path)
            if shown.redirect_to is None:
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("location", shown.redirect_to + self.path)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        shown = WebFolder(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield shown
        finally:
            server.shutdown()
            thread.join()
