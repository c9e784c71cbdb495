"""Downloads of one tenant that never end, or are as large as they can, beside another tenant's."""

import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.attacks.two_tenants import Tenant
from tests.support.bounds import check_below

MAX_BYTES = 64 << 20  # of a download; the server is started with this --max-upload-size
N_DOWNLOADS, N_AT_ONCE = 24, 4  # four of a tenant run at once in each gateway
_PIECE = bytes(1 << 20)
_NUMBERS = itertools.count()


class HostileWeb:
    """A running web server. ``asked`` counts the requests for weights by folder."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: Counter[str] = Counter()
        self.changed = threading.Condition()

    def count(self, folder: str) -> None:
        with self.changed:
            self.asked[folder] += 1
            self.changed.notify_all()

    def wait_for(self, folder: str, n: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.asked[folder] >= n, 60), self.asked


@contextmanager
def hostile_web(folder: Path) -> Iterator[HostileWeb]:
    """Serve ``folder``, whose ``lora`` is an adapter, and the adapters ``slow`` and ``huge``.

    The weights of ``slow`` do not end before the block does. Those of ``huge`` are all zeros.
    """
    ended = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            kind = self.path.split("/")[1]
            if kind != "lora" and self.path.endswith(".safetensors"):
                web.count(kind)
                self.send_response(200)
                self.send_header("content-length", str(MAX_BYTES))
                self.end_headers()
                with suppress(ConnectionError):  # the server has seen enough
                    self._send(pieces=MAX_BYTES // len(_PIECE) if kind == "huge" else 0)
                return
            self.path = self.path.replace(f"/{kind}/", "/lora/")
            super().do_GET()

        def _send(self, pieces: int) -> None:
            for _ in range(pieces):
                self.wfile.write(_PIECE)
                ended.wait(0.02)
            if not pieces:
                self.wfile.write(b"0")
                ended.wait(600)

        def log_message(self, *args: object) -> None:
            pass

    serve = functools.partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        server.daemon_threads = True
        web = HostileWeb(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield web
        finally:
            ended.set()
            server.shutdown()


def check_waits_beside_downloads(flood: Tenant, small: Tenant, web: HostileWeb) -> None:
    """Raises TooSlow if a call of ``small`` takes much longer than it does alone."""
    alone = _waits(small, web.url)
    for kind in ("huge", "slow"):  # the slow ones stay
        for _ in range(N_DOWNLOADS):
            body = {"source": f"{web.url}/{kind}", "wait": False}
            answer = flood.http.put(f"/v1/adapters/theirs-{next(_NUMBERS)}", json=body)
            assert answer.status_code == 202, answer.text
        web.wait_for(kind, N_AT_ONCE)
        beside = _waits(small, web.url)
        print(f"alone {alone}, beside {kind} downloads {beside}")
        for what, seconds in beside.items():
            check_below(seconds, 1.0 + 5 * alone[what], f"{what} beside {kind} downloads")


def _waits(tenant: Tenant, web_url: str) -> dict[str, float]:
    """Return the longest of four waits for each call, in seconds."""

    def download() -> None:
        body = {"source": f"{web_url}/lora", "wait": True}
        answer = tenant.http.put(f"/v1/adapters/mine-{next(_NUMBERS)}", json=body)
        assert answer.status_code == 201, answer.text

    def complete() -> None:
        tenant.post("/v1/completions", {"prompt": "x", "adapter": "warmed", "max_tokens": 4})

    calls: dict[str, Callable[[], object]] = {
        "download": download,
        "warm": lambda: tenant.post("/v1/adapters/warmed/warm", {}),
        "completion": complete,
        "list": lambda: tenant.http.get("/v1/adapters").raise_for_status(),
    }
    longest: dict[str, float] = {}
    for what, call in calls.items():
        for _ in range(4):
            began = time.monotonic()
            call()
            longest[what] = max(longest.get(what, 0.0), time.monotonic() - began)
    return longest
