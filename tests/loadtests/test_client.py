"""The client that times streamed tokens, against small servers of our own."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loadtests.client import Outcome, StreamingClient

EVENT = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    answer: Answer
    n_connections = 0

    def process_request(self, request: object, client_address: object) -> None:
        self.n_connections += 1
        super().process_request(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: Server, answer: Answer, n: int = 1) -> list[Outcome]:
    server.answer = answer
    client = StreamingClient(f"http://127.0.0.1:{server.server_port}")
    outcomes = [client.stream({}) for _ in range(n)]
    client.close()
    return outcomes


def whole(data: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def test_tokens_are_timed_where_they_arrive(server: Server) -> None:
    waited: list[float] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for number, data in enumerate((EVENT, EVENT, USAGE + DONE, b"")):
            if number == 1:
                began = time.perf_counter()
                time.sleep(0.05)  # the gap that is measured
                waited.append(time.perf_counter() - began)
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    (outcome,) = ask(server, answer)
    assert outcome.error is None
    assert outcome.n_tokens == 2
    assert outcome.ttft_s is not None
    assert len(outcome.gaps_s) == 1
    assert outcome.gaps_s[0] >= 0.9 * waited[0]
    assert outcome.e2e_s >= outcome.ttft_s + outcome.gaps_s[0]


def test_a_connection_is_used_again_after_an_answer_in_one_piece(server: Server) -> None:
    outcomes = ask(server, whole(EVENT + USAGE + DONE), n=3)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert server.n_connections == 1


def test_a_kept_connection_that_the_server_closed_costs_no_request(server: Server) -> None:
    """llama.cpp's server closes each connection after its answer, without saying so in a header."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        whole(EVENT + USAGE + DONE)(handler)
        handler.close_connection = True

    assert [outcome.error for outcome in ask(server, answer, n=3)] == [None, None, None]
    assert server.n_connections == 3


def test_a_stream_that_breaks_off_is_an_error(server: Server) -> None:
    (outcome,) = ask(server, whole(EVENT))
    assert outcome.error == "the stream ended without [DONE]"


def test_an_error_within_the_stream_is_an_error(server: Server) -> None:
    (outcome,) = ask(server, whole(b'data: {"error": {"message": "broken"}}\n\n' + DONE))
    assert outcome.error == "broken"


@pytest.mark.parametrize("status", [429, 503])
def test_told_to_come_back_is_refused_and_no_error(server: Server, status: int) -> None:
    (outcome,) = ask(server, whole(b"{}", status, Retry_After="2"))
    assert outcome.refused
    assert outcome.retry_after == "2"
    assert outcome.error is None


def test_other_statuses_are_errors_with_the_servers_words(server: Server) -> None:
    (outcome,) = ask(server, whole(b"no such adapter", 404))
    assert not outcome.refused
    assert outcome.error == "404: no such adapter"


def test_nobody_listening_is_an_outcome_not_an_exception() -> None:
    outcome = StreamingClient("http://127.0.0.1:9").stream({})
    assert outcome.status == 0
    assert outcome.error is not None
    assert "refused" in outcome.error
