"""Two tenants do as they like on one server; each sees what it would see alone."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.tenants.conftest import House, comparable, open_house

TENANTS = ("acme", "umbra")
SHARED = "shared"
Step = tuple[str, str, str, int]  # tenant, operation, name, source

_steps = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(
            [
                *("put", "put", "put new", "delete", "get", "list", "models", "pin", "unpin"),
                *("warm", "unload", "revisions", "rollback", "ask", "mix", "generate", "describe"),
                *("vllm load", "vllm unload"),
            ]
        ),
        st.sampled_from(["a", "b", SHARED]),
        st.integers(0, 2),
    ),
    min_size=6,
    max_size=24,
)


class Houses:
    """One for both tenants, and one for each alone."""

    def __init__(self, both: House, alone: dict[str, House]) -> None:
        self.both = both
        self.alone = alone
        self._walks = count()

    def walk(self, steps: Sequence[Step]) -> None:
        asyncio.run(self._walk(steps, f"walk-{next(self._walks)}"))

    async def _walk(self, steps: Sequence[Step], prefix: str) -> None:
        """``prefix``: names of their own, since a name never gets a revision number twice."""
        try:
            together = [await _take(self.both, step, prefix) for step in steps]
            for number, step in enumerate(steps):
                alone = await _take(self.alone[step[0]], step, prefix)
                assert comparable(together[number]) == comparable(alone), (number, step)
        finally:  # also after a failure, which shorter walks try to repeat
            for house in (self.both, *self.alone.values()):
                for card in house.front.store.list():
                    if card.name != SHARED:
                        house.front.store.delete(card.name)


async def _take(house: House, step: Step, prefix: str) -> httpx.Response:
    tenant, operation, name, number = step
    name = name if name == SHARED else f"{prefix}-{name}"
    path, half = f"/v1/adapters/{name}", {"name": SHARED, "weight": 0.5}
    wish = f"{prefix} {number}"
    match operation:
        case "put":
            return await house.upload(tenant, name, number)
        case "put new":
            return await house.upload(tenant, name, number, headers={"if-none-match": "*"})
        case "delete":
            return await house.ask(tenant, "DELETE", path)
        case "get":
            return await house.ask(tenant, "GET", path)
        case "revisions":
            return await house.ask(tenant, "GET", f"{path}/revisions")
        case "list":
            return await house.ask(tenant, "GET", "/v1/adapters")
        case "models":
            return await house.ask(tenant, "GET", f"/v1/models?loaded={bool(number)}")
        case "pin" | "unpin" | "warm" | "unload" | "rollback":
            return await house.ask(tenant, "POST", f"{path}/{operation}")
        case "ask":
            return await house.ask(
                tenant, "POST", "/v1/completions", {"prompt": "hi", "adapter": name}
            )
        case "mix":
            mixture = [{"name": name, "weight": 1.0}, half]
            return await house.ask(
                tenant, "POST", "/v1/completions", {"prompt": "hi", "adapter": mixture}
            )
        case "generate":
            order = {"description": wish, "probe": False}
            return await house.ask(tenant, "POST", "/v1/adapters/generate", order)
        case "describe":
            described = {"prompt": "hi", "adapter": {"description": wish}}
            return await house.ask(tenant, "POST", "/v1/completions", described)
        case "vllm load":
            load = {"lora_name": name, "lora_path": f"source-{number}"}
            return await house.ask(tenant, "POST", "/v1/load_lora_adapter", load)
        case _:
            return await house.ask(tenant, "POST", "/v1/unload_lora_adapter", {"lora_name": name})


@pytest.fixture(scope="module")
def houses(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Houses]:
    with ExitStack() as closing:

        def build(name: str) -> House:
            house = closing.enter_context(
                open_house(tokenizer, base_spec, tmp_path_factory.mktemp(name), n_kept_revisions=1)
            )
            house.front.store.put_directory(SHARED, house.sources[2])
            return house

        yield Houses(build("both"), {tenant: build(tenant) for tenant in TENANTS})


_SETTINGS = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@settings(_SETTINGS, max_examples=10)
@given(_steps)
def test_each_tenant_sees_what_it_would_see_alone(houses: Houses, steps: list[Step]) -> None:
    houses.walk(steps)


@pytest.mark.slow
@pytest.mark.nightly
@settings(_SETTINGS, max_examples=80, derandomize=False)
@given(_steps)
def test_each_tenant_sees_what_it_would_see_alone_on_long_walks(
    houses: Houses, steps: list[Step]
) -> None:
    houses.walk(steps)
