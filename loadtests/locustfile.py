"""Chats with every adapter of a running server, on locust's own terms: its web page, its options.

    locust -f loadtests/locustfile.py --host http://localhost:8000
    locust -f loadtests/locustfile.py --host … --headless -u 16 -r 4 -t 1m

Needs no scenario and uploads nothing: users ask for the models that `GET /v1/models` lists, the
base among them. `loraplex bench` runs the scenarios, with adapters of its own.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any, ClassVar

import httpx
from locust import events
from locust.env import Environment
from locust.exception import StopTest

from loadtests.client import StreamingClient, admin_client
from loadtests.scenario import Phase, RequestSpec
from loadtests.shapes import Constant
from loadtests.traffic import LoraplexBody, Traffic
from loadtests.users import ChatUser, PhaseLoad


class AdapterUser(ChatUser):
    """Streams one chat after the other; the adapter is drawn anew for each."""

    problem: ClassVar[str | None] = None  # why there is nothing to do

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        if self.problem:
            raise StopTest(self.problem)  # here, as locust does for a missing host


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument(
        "--api-key", env_var="LORAPLEX_API_KEY", is_secret=True, help="Key of the server"
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="Output tokens of a request")
    parser.add_argument("--prompt-chars", type=int, default=400, help="Characters of a prompt")
    parser.add_argument("--zipf", type=float, default=0.0, help="Skew of the adapters; 0: even")
    parser.add_argument("--base-share", type=float, default=0.1, help="Of requests without adapter")
    parser.add_argument("--seed", type=int, default=1, help="Of prompts and choices")


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """At each start of a test, from the web page as well: the host may be another one."""
    try:
        AdapterUser.load = _load(environment.parsed_options, (environment.host or "").rstrip("/"))
        AdapterUser.problem = environment.process_exit_code = None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        AdapterUser.problem = f"cannot list the models of {environment.host}: {error}"
        environment.process_exit_code = 1


def _load(options: Namespace, host: str) -> PhaseLoad:
    with admin_client(host, options.api_key) as client:
        response = client.get("/v1/models").raise_for_status()
    first, *others = response.json()["data"]
    base, adapters = first["id"], [card["id"] for card in others if card.get("parent")]
    phase = _endless_phase(options, with_adapters=bool(adapters))
    request = RequestSpec(options.prompt_chars, options.max_tokens)
    traffic = Traffic(phase, request, {"lora": adapters}, LoraplexBody(base), options.seed)
    return PhaseLoad(phase, traffic, StreamingClient(host, options.api_key))


def _endless_phase(options: Namespace, *, with_adapters: bool) -> Phase:
    """Locust says how many users there are, and when they stop."""
    shares = {"base": options.base_share, "lora": 1 - options.base_share}
    return Phase(
        "locust",
        seconds=math.inf,
        warmup_s=0.0,
        users=Constant(0),
        pick="zipf" if options.zipf else "round-robin",
        zipf=(options.zipf, options.zipf),
        mix=shares if with_adapters else {"base": 1.0},
    )
