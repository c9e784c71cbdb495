"""Commands against what is no server of ours: one line, no traceback."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from loraplex_server.cli.app import app

COMMANDS = {
    "adapters list": "--url",
    "adapters rm x": "--url",
    "generate French": "--server",
    "chat": "--url",
}


class Proxy(BaseHTTPRequestHandler):
    """A page with the status that its path begins with."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def failure(command: str, url: str) -> str:
    result = CliRunner().invoke(app, [*command.split(), COMMANDS[command], url])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.mark.parametrize("status", [200, 302, 502])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_of_a_proxy_is_no_answer(proxy: str, command: str, status: int) -> None:
    told = failure(command, f"{proxy}/{status}")
    assert f"answered {status}" in told or "is not a loraplex server" in told
    assert "<html>" not in told


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_url_is_said(command: str) -> None:
    assert "Invalid port: '80a'" in failure(command, "http://h:80a")
