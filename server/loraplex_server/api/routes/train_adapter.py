"""POST /v1/adapters/train: chats in, a job, and in the end an adapter under a name."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.adapters.access import access_of, name_to_write
from loraplex_server.adapters.training import TrainingOrder
from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import (
    ExamplePair,
    JobShown,
    TrainAdapterBody,
    TrainingChat,
)
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import State, in_store_thread
from loraplex_training.errors import ExamplesError
from loraplex_training.examples import Chat, chat_of

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/adapters/train",
    status_code=202,
    response_model=JobShown,
    responses=errors(412, 415),
)
async def train_adapter(body: TrainAdapterBody, request: Request, state: State) -> Response:
    """Only with ``--allow-training``. The adapter is there when the job has ended; see its
    ``location``, and ``/events`` below it for the losses as they come.
    """
    state.lifecycle.check_admitting()
    if state.training is None:
        raise invalid(
            "this server trains no adapters; start it with --allow-training, or train elsewhere "
            "(loraplex train) and add the adapter",
            None,
            "feature_not_enabled",
        )
    access = access_of(request)
    name = await in_store_thread(
        state,
        lambda: name_to_write(state.store, access, body.name, param="name"),
        access,
    )
    if not body.replace and state.store.has_name(name):
        raise ApiError(
            412,
            f"adapter {body.name!r} exists; take another name, or say replace",
            code="revision_conflict",
            param="name",
        )
    order = TrainingOrder(
        name=name,
        chats=[_chat(example, f"examples[{i}]") for i, example in enumerate(body.examples)],
        description=body.description,
        steps=body.steps,
        budget_s=body.budget_s,
        rank=body.rank,
        alpha=body.alpha,
        lr=body.lr,
        seed=body.seed,
        replace=body.replace,
    )
    job = state.training.start(order, access)
    return ORJSONResponse(job.to_json(), status=202, headers={"location": f"/v1/jobs/{job.id}"})


def _chat(example: TrainingChat | ExamplePair, where: str) -> Chat:
    """Raises ApiError (400)."""
    if isinstance(example, ExamplePair):
        said = [("user", example.prompt), ("assistant", example.answer)]
        return Chat([{"role": role, "content": content} for role, content in said])
    try:
        return chat_of(example.model_dump(), where)
    except ExamplesError as error:
        raise invalid(str(error), "examples", "unfit_examples") from error
