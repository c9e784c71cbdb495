"""A locustfile that chats with every adapter of a running server.

    locust -f loadtests/locustfile.py --host http://localhost:8000
    locust -f loadtests/locustfile.py --host … --headless -u 16 -r 4 -t 1m

Needs no scenario and uploads nothing: users ask for the models that `GET /v1/models` lists, the
base among them. `loraplex bench` runs the scenarios, with adapters of its own.
"""

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
    """A user that streams one chat after another, each to a random adapter."""

    problem: ClassVar[str | None] = None  # why there is nothing to do

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        if self.problem:
            raise StopTest(self.problem)  # here, as locust does for a missing host


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument(
        "--api-key", env_var="LORAPLEX_API_KEY", is_secret=True, help="API key of the server."
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="Output tokens of each request.")
    parser.add_argument("--prompt-chars", type=int, default=400, help="Characters of each prompt.")
    parser.add_argument(
        "--zipf", type=float, default=0.0, help="Zipf exponent of the adapters; 0 is uniform."
    )
    parser.add_argument(
        "--base-share", type=float, default=0.1, help="Share of requests without an adapter."
    )
    parser.add_argument("--seed", type=int, default=1, help="Seed of prompts and adapter choices.")


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Read the server's adapters at each start of a test, since the host may have changed."""
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
    """Return a phase without users or end: locust's options decide both."""
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
