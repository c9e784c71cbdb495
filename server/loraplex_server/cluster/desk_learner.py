"""Examples that a request brings are learnt where jobs are: by the Desk, for all gateways."""

from __future__ import annotations

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loraplex_adapter_store.errors import StoreError
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest
from loraplex_server.adapters.learning import Learner, Learnt
from loraplex_server.api.errors import ApiError, from_store, unavailable
from loraplex_server.api_keys import AdapterAccess

from .refused import Refused

__all__ = ["DeskLearner", "learnt_by"]


class DeskLearner:
    """A ``Learner`` in a gateway. Event loop only."""

    def __init__(self, desk: DeploymentHandle) -> None:
        self._learn = desk.options(method_name="learn")

    async def learn(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        *,
        wait: bool,
        needs_adapter: bool,
    ) -> Learnt:
        """Raises ApiError."""
        try:
            answer: Learnt | Refused = await self._learn.remote(
                request, access, wait, needs_adapter
            )
        except (RayError, RayServeException) as error:
            raise unavailable("what learns from examples was lost", "desk_lost", 2.0) from error
        if isinstance(answer, Refused):
            raise answer.error()
        return answer


async def learnt_by(
    learner: Learner,
    request: AdapterGenerationRequest,
    access: AdapterAccess,
    *,
    wait: bool,
    needs_adapter: bool,
) -> Learnt | Refused:
    """In the Desk."""
    try:
        return await learner.learn(request, access, wait=wait, needs_adapter=needs_adapter)
    except StoreError as error:
        return Refused.of(from_store(error, param="adapter", access=access))
    except ApiError as error:
        return Refused.of(error)
