"""POST /v1/adapters/generate and /v1/adapters/train: routes that make a new adapter."""

from fastapi import APIRouter, Response

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.selector import NameRef
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.fine_tuning.training import TrainingRequest
from loraplex_server.adapters.learning.base_agreement import base_agreement
from loraplex_server.adapters.learning.jobs import Job
from loraplex_server.adapters.learning.store_methods import order_of
from loraplex_server.adapters.resolving.access import check_allowed
from loraplex_server.api.adapter_card import AdapterActivity, Report, shown_card
from loraplex_server.api.adapter_path import new_name
from loraplex_server.api.adapter_shape import requested_shape
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import (
    Adapter,
    ExamplePair,
    GenerateAdapterBody,
    JobShown,
    TrainAdapterBody,
    TrainingChat,
)
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import (
    Access,
    AppState,
    Share,
    State,
    in_load_thread,
    in_store_thread,
)
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.errors import ApiError, from_store, invalid
from loraplex_server.settings.api_keys import GENERATED, AdapterAccess
from loraplex_training.errors import ExamplesError
from loraplex_training.examples import Chat, chat_of

from .jobs import job_response

router = APIRouter(route_class=JsonRoute, tags=["Training"])


@router.post(
    "/v1/adapters/generate",
    status_code=201,
    response_model=Adapter,
    responses=errors(404, 409, 412, 415, 422)
    | {202: {"model": JobShown, "description": "learning from the examples; see its `location`"}},
)
async def generate_adapter(
    body: GenerateAdapterBody,
    access: Access,
    share: Share,
    state: State,
    report: Report = "summary",
) -> Response:
    """Make an adapter from a description. Its card states method, parts, scores and digests.

    With ``examples``, a draft answers at once, and the adapter that is learnt replaces it.
    """
    state.lifecycle.check_admitting()
    adapters = state.makers.generated
    if adapters is None:
        raise invalid(
            "adapter generation is not enabled on this server", None, "feature_not_enabled"
        )
    name = None
    if body.name is None:
        check_allowed(access, GENERATED, param="name")
    else:
        name = await new_name(body.name, access, state)
    request = AdapterGenerationRequest(
        body.description.strip(),
        tuple(body.wordings),
        tuple(body.prompts),
        body.method,
        body.seed,
        body.samples,
        tuple((pair.prompt, pair.answer) for pair in body.examples or ()),
        body.force,
    )
    try:
        order = await order_of(state.makers.store_methods, request, access)
    except StoreError as error:
        raise from_store(error, param="description", access=access) from error
    if body.examples:
        learnt = await _learn(state, body, request, access, name)
        if isinstance(learnt, Job):
            return job_response(learnt)
        return await _card_response(state, access, share, body, learnt, report)
    for field in ("budget_s", "wait"):
        if field in body.model_fields_set:
            raise invalid(f"{field} is for requests with examples", field)
    card = await in_store_thread(
        state,
        lambda: adapters.ensure(
            order.request,
            tenant=access.tenant or "",
            name=name,
            ttl_s=body.ttl_s,
            quota=access.quota,
            make=order.make,
        ),
        access,
        pool=state.pools.generation,
        param="description",
    )
    return await _card_response(state, access, share, body, card, report)


@router.post(
    "/v1/adapters/train", status_code=202, response_model=JobShown, responses=errors(412, 415)
)
async def train_adapter(body: TrainAdapterBody, access: Access, state: State) -> Response:
    """Train an adapter on chats, on servers with ``--allow-training``.

    The adapter exists when the job at ``location`` has ended. ``/events`` below that path streams
    the losses.
    """
    state.lifecycle.check_admitting()
    if state.makers.training is None:
        raise invalid(
            "this server trains no adapters; start it with --allow-training, or train elsewhere "
            "(loraplex train) and add the adapter",
            None,
            "feature_not_enabled",
        )
    name = await new_name(body.name, access, state)
    if not body.replace and state.store.has_name(name):
        raise ApiError(
            412,
            f"adapter {body.name!r} exists; choose another name, or set replace",
            code="revision_conflict",
            param="name",
        )
    order = TrainingRequest(
        name=name,
        chats=[_chat(example, f"examples[{i}]") for i, example in enumerate(body.examples)],
        description=body.description,
        steps=body.steps,
        budget_s=body.budget_s,
        shape=requested_shape(body, state.config.engine.max_lora_rank),
        lr=body.lr,
        seed=body.seed,
        replace=body.replace,
        metric=body.metric,
    )
    return job_response(await state.makers.training.start(order, access))


async def _learn(
    state: AppState,
    body: GenerateAdapterBody,
    request: AdapterGenerationRequest,
    access: AdapterAccess,
    name: str | None,
) -> AdapterCard | Job:
    """Return the card if the job is done or ``wait`` is set, else the job. Raises ApiError."""
    learning = state.makers.learning
    if learning is None:
        raise invalid("this server learns nothing from examples", "examples", "feature_not_enabled")
    try:
        card, job, _ = await learning.submit(
            request, access, name=name, ttl_s=body.ttl_s, budget_s=body.budget_s
        )
    except StoreError as error:
        raise from_store(error, param="description", access=access) from error
    if job is None:
        assert card is not None
        return card
    return await learning.wait(job) if body.wait else job


async def _card_response(
    state: AppState,
    access: AdapterAccess,
    share: TenantShare,
    body: GenerateAdapterBody,
    card: AdapterCard,
    report: Report,
) -> Response:
    probes = body.probe and state.model.writes_text  # an encoder answers no chats
    agreement = await _agreement(state, access, share, card) if probes else None
    shown = shown_card(access, card, AdapterActivity.of(state), report)
    return ORJSONResponse(
        {**shown, "base_agreement": agreement}, status=201, headers={"etag": f'"{card.etag}"'}
    )


async def _agreement(
    state: AppState, access: AdapterAccess, share: TenantShare, card: AdapterCard
) -> float | None:
    """Return None if the engine is too busy, or if the adapter has gone."""
    ref = NameRef(card.name, card.digest[:12])
    try:
        lease = await in_load_thread(state, lambda: state.store.acquire(ref), access)
    except ApiError:
        return None
    with lease:
        try:
            return round(await base_agreement(state.engine, state.text, lease, share), 4)
        except EngineError:
            return None


def _chat(example: TrainingChat | ExamplePair, where: str) -> Chat:
    """Return the chat of a training example. Raises ApiError (400)."""
    if isinstance(example, ExamplePair):
        turns = [("user", example.prompt), ("assistant", example.answer)]
        return Chat([{"role": role, "content": content} for role, content in turns])
    try:
        return chat_of(example.model_dump(), where)
    except ExamplesError as error:
        raise invalid(str(error), "examples", "unfit_examples") from error
