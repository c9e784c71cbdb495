"""Every route × an adapter of one's own, another tenant's, a shared one, one that is missing."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.tenants.conftest import House, comparable, open_house

pytestmark = pytest.mark.anyio

OWN, THEIRS, SHARED, MISSING = "mine", "theirs-1", "shared", "theirs-2"
NO_ADAPTER = "names no adapter"
MESSAGES = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Row:
    """``path`` and ``body`` hold the adapter's name as ``{}``; the statuses that are expected."""

    path: str
    body: Any = None
    own: int = 200
    shared: int = 200
    missing: int = 404  # another tenant's is answered as this is


def _selectors(path: str, body: dict[str, object], answered: int = 200) -> list[Row]:
    """Every way to name an adapter in a body; ``answered``: the status of one that exists."""
    half = {"name": OWN, "weight": 0.5}
    ways: list[dict[str, object]] = [
        {"adapter": "{}"},
        {"adapter": {"name": "{}"}},
        {"adapter": [{"name": "{}", "weight": 0.5}, half]},
        {"model": "{}"},
        {"model": "base:{}"},
    ]
    rows = [Row(path, body | way, answered, answered) for way in ways]
    rows.append(Row(path, body | {"adapter": "{}@0123456789"}, 404, 404))
    rows.append(Row(path, body | {"adapter_id": "{}"}, answered, answered))
    return rows


def _selector(path: str, body: dict[str, object], answered: int = 200) -> list[Row]:
    """One way: the others are read by the same code."""
    return _selectors(path, body, answered)[:1]


def _actions(name: str, own: int = 200, shared: int = 200) -> list[Row]:
    return [Row(f"/v1/adapters/{{}}/{name}", {}, own, shared)]


PUT_SOURCE = {"source": "source-1"}
NAMED = {"description": "to French", "name": "{}", "probe": False}
TRAINED = {"name": "{}", "examples": [{"prompt": "a", "answer": "b"}] * 2}
LOAD = {"lora_name": "{}", "lora_path": "source-1"}
PAIR = {"text_1": "a", "text_2": "b"}
RANK = {"query": "a", "documents": ["b"]}
VECTORS = 400  # the adapters here are no classifiers, and this engine has no hidden states

_MOVES = ("cancel", "pause", "resume")
ROWS: dict[tuple[str, str], list[Row] | str] = {
    ("POST", "/v1/chat/completions"): _selectors("/v1/chat/completions", {"messages": MESSAGES}),
    ("POST", "/v1/completions"): _selectors("/v1/completions", {"prompt": "hi"}),
    ("POST", "/v1/messages"): _selectors("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
    ("POST", "/v1/messages/count_tokens"): _selector(
        "/v1/messages/count_tokens", {"messages": MESSAGES}
    ),
    ("POST", "/v1/responses"): _selectors("/v1/responses", {"input": "hi"}),
    ("POST", "/tokenize"): _selector("/tokenize", {"messages": MESSAGES}),
    **{
        ("POST", path): [Row(path, {"inputs": "hi", "parameters": {"adapter_id": "{}"}})]
        for path in ("/", "/generate", "/generate_stream")
    },
    ("POST", "/v1/embeddings"): _selector("/v1/embeddings", {"input": "hi"}),
    ("POST", "/pooling"): _selector("/pooling", {"input": "hi"}),
    ("POST", "/classify"): _selector("/classify", {"input": "hi"}, VECTORS),
    ("POST", "/score"): _selector("/score", PAIR),
    ("POST", "/v1/score"): _selector("/v1/score", PAIR),
    ("POST", "/v1/classify/zero-shot"): "bases of images alone; reads its adapter as /classify",
    ("POST", "/rerank"): _selector("/rerank", RANK),
    ("POST", "/v1/rerank"): _selector("/v1/rerank", RANK),
    ("POST", "/v2/rerank"): _selector("/v2/rerank", RANK),
    ("GET", "/v1/models/{model_id}"): [Row("/v1/models/{}"), Row("/v1/models/base:{}")],
    ("GET", "/v1/adapters/{name}"): [Row("/v1/adapters/{}"), Row("/v1/adapters/{}?report=full")],
    ("PATCH", "/v1/adapters/{name}"): [
        Row("/v1/adapters/{}", {"description": "edited"}, 200, 403, 404),
    ],
    ("PUT", "/v1/adapters/{name}"): [
        Row("/v1/adapters/{}", PUT_SOURCE, 200, 403, 201),
        Row("/v1/adapters/{}", {**PUT_SOURCE, "wait": False}, 202, 403, 202),
    ],
    ("DELETE", "/v1/adapters/{name}"): [Row("/v1/adapters/{}", None, 200, 403)],
    ("POST", "/v1/adapters/{name}/pin"): _actions("pin", shared=403),
    ("POST", "/v1/adapters/{name}/unpin"): _actions("unpin", shared=403),
    ("POST", "/v1/adapters/{name}/warm"): _actions("warm"),
    ("POST", "/v1/adapters/{name}/unload"): _actions("unload", shared=403),
    ("POST", "/v1/adapters/{name}/rollback"): _actions("rollback", own=400, shared=403),
    ("GET", "/v1/adapters/{name}/revisions"): _actions("revisions"),
    ("GET", "/v1/adapters/{name}/routing"): _actions("routing", shared=403),
    ("POST", "/v1/adapters/generate"): [Row("/v1/adapters/generate", NAMED, 412, 403, 201)],
    ("POST", "/v1/adapters/train"): [Row("/v1/adapters/train", TRAINED, 412, 403, 202)],
    ("POST", "/v1/load_lora_adapter"): [Row("/v1/load_lora_adapter", LOAD, 400, 403, 200)],
    ("POST", "/v1/unload_lora_adapter"): [
        Row("/v1/unload_lora_adapter", {"lora_name": "{}"}, 200, 403)
    ],
    ("POST", "/load_lora_adapter"): [Row("/load_lora_adapter", LOAD, 400, 403, 200)],
    ("POST", "/unload_lora_adapter"): [Row("/unload_lora_adapter", {"lora_name": "{}"}, 200, 403)],
    # Tested with the names in their answers, see test_names.py.
    ("GET", "/v1/models"): NO_ADAPTER,
    ("GET", "/v1/adapters"): NO_ADAPTER,
    ("GET", "/v1/jobs/{job_id}"): NO_ADAPTER,
    ("GET", "/v1/jobs/{job_id}/events"): NO_ADAPTER,
    ("POST", "/v1/jobs/{job_id}/cancel"): NO_ADAPTER,
    ("POST", "/v1/route"): NO_ADAPTER,
    # Tested with the tenants' own, see tests/server/api/serving/test_responses.py.
    ("GET", "/v1/responses/{response_id}"): NO_ADAPTER,
    ("DELETE", "/v1/responses/{response_id}"): NO_ADAPTER,
    ("GET", "/metrics"): NO_ADAPTER,
    # Their lines do, see test_batches.py.
    **dict.fromkeys(
        [
            *((m, "/v1/files") for m in ("GET", "POST")),
            *((m, "/v1/files/{file_id}") for m in ("GET", "DELETE")),
            ("GET", "/v1/files/{file_id}/content"),
            *((m, "/v1/batches") for m in ("GET", "POST")),
            ("GET", "/v1/batches/{batch_id}"),
            ("POST", "/v1/batches/{batch_id}/cancel"),
        ],
        NO_ADAPTER,
    ),
    # Tinker's API, see tests/server/tinker/test_tenants.py.
    **dict.fromkeys(
        [
            *(
                ("POST", f"/api/v1/{path}")
                for path in (
                    *("client/config", "client/dynamic_config", "telemetry", "create_session"),
                    *("session_heartbeat", "sessions/{session_id}/finish", "create_model"),
                    *("load_weights", "get_info", "forward_backward", "optim_step"),
                    *("save_weights", "save_weights_for_sampler", "create_sampling_session"),
                    *("join_sampling_session", "asample", "cancel_future", "retrieve_future"),
                    "weights_info",
                )
            ),
            *(
                ("GET", f"/api/v1/{path}")
                for path in (
                    *("healthz", "get_server_capabilities", "sessions", "sessions/{session_id}"),
                    *("samplers/{sampler_id}", "training_runs", "training_runs/{run_id}"),
                    *("training_runs/{run_id}/checkpoints", "checkpoints"),
                )
            ),
            ("DELETE", "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"),
            ("PUT", "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl"),
        ],
        NO_ADAPTER,
    ),
    # Tested with the tenants' own, see tests/contract/test_fine_tuning.py.
    **dict.fromkeys(
        [
            *((m, "/v1/fine_tuning/jobs") for m in ("GET", "POST")),
            ("GET", "/v1/fine_tuning/jobs/{job_id}"),
            *(("POST", f"/v1/fine_tuning/jobs/{{job_id}}/{a}") for a in _MOVES),
            *(("GET", f"/v1/fine_tuning/jobs/{{job_id}}/{a}") for a in ("events", "checkpoints")),
        ],
        NO_ADAPTER,
    ),
    **dict.fromkeys(
        [
            ("POST", "/detokenize"),
            ("GET", "/info"),
            ("GET", "/version"),
            *(("GET", p) for p in ("/v1/live", "/v1/live/events", "/v1/requests", "/v1/cluster")),
            *((m, p) for m in ("GET", "HEAD") for p in ("/", "/console/{name}")),
            *((m, p) for m in ("GET", "HEAD") for p in ("/guide", "/guide/{path}")),
            *((m, p) for m in ("GET", "HEAD") for p in ("/health", "/ready", "/ping")),
            *(("GET", p) for p in ("/docs", "/docs/oauth2-redirect", "/openapi.json")),
            ("HEAD", "/openapi.json"),
        ],
        NO_ADAPTER,
    ),
}


def _routes(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _routes(included.routes)
        for method in getattr(route, "methods", None) or ():
            yield method, re.sub(r":\w+}", "}", route.path)


@pytest.fixture(scope="module")
def shared_house(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    with open_house(tokenizer, base_spec, tmp_path_factory.mktemp("matrix")) as house:
        yield house


def test_every_route_of_the_app_has_a_row(shared_house: House) -> None:
    assert set(_routes(shared_house.front.app.routes)) == set(ROWS)


@pytest.mark.parametrize(
    ("method", "row"),
    [
        pytest.param(method, row, id=f"{method} {row.path} {row.body}"[:90])
        for (method, _), rows in ROWS.items()
        if not isinstance(rows, str)
        for row in rows
    ],
)
async def test_anothers_adapter_is_as_one_that_is_missing(
    shared_house: House, method: str, row: Row
) -> None:
    house = shared_house
    told = {}
    for name in (OWN, SHARED, MISSING, THEIRS):
        await _restore(house)
        seen_by_umbra = await house.ask("umbra", "GET", "/v1/adapters")
        path, body = _filled(row.path, name), _filled(row.body, name)
        told[name] = await house.ask("acme", method, path, body)
        if told[name].status_code == 202:
            await house.job_ends(told[name])
        assert (await house.ask("umbra", "GET", "/v1/adapters")).text == seen_by_umbra.text
    statuses = {name: answer.status_code for name, answer in told.items()}
    assert statuses == {OWN: row.own, SHARED: row.shared, MISSING: row.missing, THEIRS: row.missing}
    theirs, missing = comparable(told[THEIRS]), comparable(told[MISSING])
    assert theirs[:2] == missing[:2]
    assert theirs[2].replace(THEIRS, "…") == missing[2].replace(MISSING, "…")


async def _restore(house: House) -> None:
    """``OWN``, ``THEIRS`` and ``SHARED``, and nothing else."""
    names = {"acme:" + OWN: 0, "umbra:" + THEIRS: 1, SHARED: 2}
    store = house.front.store
    for card in store.list():
        if card.name not in names:
            store.delete(card.name)
        elif card.pinned:
            store.unpin(card.name)
    for name, number in names.items():
        if not store.has_name(name) or store.get(name).revision > 1:
            if store.has_name(name):
                store.delete(name)
            store.put_directory(name, house.sources[number])


def _filled(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace("{}", name)
    if isinstance(value, list):
        return [_filled(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, name) for key, item in value.items()}
    return value
