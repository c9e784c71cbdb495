"""The one process of a cluster that owns files, batches, jobs, learning and the counts of keys."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from loraplex_adapter_store.errors import StoreError
from loraplex_server.adapters.learning.learning import Learner, LearningRequest, LearningResult
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.errors import ApiError, from_store, unavailable
from loraplex_server.settings.api_keys import ApiKey
from loraplex_server.settings.config import ServerConfig

from .forwarding import BodyPiece, ForwardedBodies, ForwardedRequest, answer_forwarded
from .front_process import FrontProcess

_ANSWER_TIMEOUT_S = 2.0  # a count takes a millisecond

_log = logging.getLogger(__name__)
_FOLDER = "desk"  # below the state directory, with files and batches


class KeyUsage(NamedTuple):
    """The limits and refusals of a key, as the coordinator answers them to a gateway."""

    refusal: ApiError | None  # None: the operation was counted
    headers: Mapping[str, str]  # the limits that are left
    token_refusal: ApiError | None  # what ``check_tokens`` would raise now


class KeyLimits:
    """The meters of all keys, in the coordinator. Event loop only: one count at a time.

    A gateway asks before a call runs, so two gateways cannot both take a key's last request. While
    the coordinator is lost, each gateway counts for itself, and a key may use up to its limit on
    each. A new coordinator starts with full buckets, as a restarted server does. Engines count
    ``max_running`` and ``max_queued``.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._meters = {key.id: Meter(key) for key in keys}

    def meter_of(self, key: ApiKey) -> Meter:
        return self._meters[key.id]

    async def count(self, key_id: str, operation: str, n_tokens: int) -> KeyUsage:
        """Apply a meter's operation to the key. Raises KeyError for an unknown key."""
        meter = self._meters[key_id]
        refusal = token_refusal = None
        try:
            match operation:
                case "check_request":
                    await meter.check_request()
                case "take_request":
                    await meter.take_request()
                case "reserve_tokens":
                    await meter.reserve_tokens(n_tokens)
                case "give_back_tokens":
                    meter.give_back_tokens(n_tokens)
        except ApiError as error:
            refusal = error
        try:
            meter.check_tokens()
        except ApiError as error:
            token_refusal = error
        return KeyUsage(refusal, meter.headers(), token_refusal)


class SharedMeter(Meter):
    """A key's meter in one gateway, which counts alone while the coordinator does not answer."""

    def __init__(self, key: ApiKey, coordinator: DeploymentHandle) -> None:
        super().__init__(key)
        self._key_id = key.id
        self._count = coordinator.options(method_name="count_usage")
        self._last: KeyUsage | None = None  # None while this gateway counts alone
        self._tasks: set[asyncio.Task[bool]] = set()

    async def check_request(self) -> None:
        if not await self._counted("check_request"):
            await super().check_request()

    async def take_request(self) -> None:
        if not await self._counted("take_request"):
            await super().take_request()

    def check_tokens(self) -> None:
        if self._last is None:
            super().check_tokens()
        elif self._last.token_refusal is not None:
            raise self._last.token_refusal

    async def reserve_tokens(self, n: int) -> None:
        if not await self._counted("reserve_tokens", n):
            await super().reserve_tokens(n)

    def give_back_tokens(self, n: int) -> None:
        if self._last is None:
            super().give_back_tokens(n)
            return
        task = asyncio.get_running_loop().create_task(self._counted("give_back_tokens", n))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def headers(self) -> Mapping[str, str]:
        return super().headers() if self._last is None else self._last.headers

    async def _counted(self, operation: str, n_tokens: int = 0) -> bool:
        """Return True if the coordinator replied. Raises ApiError if it refuses."""
        try:
            answer = self._count.remote(self._key_id, operation, n_tokens)
            usage: KeyUsage = await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            if self._last is not None:
                _log.warning("key %s is counted by this gateway alone: %s", self._key_id, error)
            self._last = None
            return False
        self._last = usage
        if usage.refusal is not None:
            raise usage.refusal
        return True


def remote_learner(coordinator: DeploymentHandle) -> Learner:
    """Return a learner for a gateway. It raises ApiError."""
    learn = coordinator.options(method_name="learn")

    async def ask(order: LearningRequest) -> LearningResult:
        try:
            answer: LearningResult | ApiError = await learn.remote(order)
        except (RayError, RayServeException) as error:
            message = "the coordinator, which learns from examples, was lost; try again"
            raise unavailable(message, "coordinator_lost", 2.0) from error
        if isinstance(answer, ApiError):
            raise answer
        return answer

    return ask


async def result_or_error(learner: Learner, order: LearningRequest) -> LearningResult | ApiError:
    """Learn in the coordinator. Returns errors, since Ray would wrap raised ones."""
    try:
        return await learner(order)
    except StoreError as error:
        return from_store(error, param="adapter", access=order.access)
    except ApiError as error:
        return error


class Coordinator(FrontProcess):
    """The Ray deployment that gateways call. Ray runs one, on one event loop.

    It also registers the config's adapters.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: ServerConfig, engines: DeploymentHandle
    ) -> None:
        """Wait for an engine replica. Raises StoreError, ModelError, ValueError or OSError."""
        root = config.store.root
        assert root is not None  # ``ClusterConfig`` always sets it
        self._limits = KeyLimits(config.http.api_keys)
        self._bodies = ForwardedBodies()
        meter_of = self._limits.meter_of
        await self.start(config, engines, "coordinator", meter_of, folder=root / _FOLDER)

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message]]:
        """Answer a request of a gateway; see ``answer_forwarded``."""
        answer = answer_forwarded(self.front, request, self._bodies)
        async with contextlib.aclosing(answer) as lists:
            async for messages in lists:
                yield messages

    async def put_piece(self, request_id: str, piece: BodyPiece) -> None:
        """Hand the next piece of a body to the request that ``answer`` answers."""
        self._bodies.put(request_id, piece)

    async def learn(self, order: LearningRequest) -> LearningResult | ApiError:
        """Learn from the examples of a gateway's request."""
        learning = self.services.makers.learning
        assert learning is not None  # gateways have the same config
        return await result_or_error(learning.learn, order)

    async def count_usage(self, key_id: str, operation: str, n_tokens: int) -> KeyUsage:
        """Count a gateway's request or tokens; see ``KeyLimits.count``."""
        return await self._limits.count(key_id, operation, n_tokens)
