"""The deployment that clients connect to. Gateways hold no state of their own."""

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.settings.api_keys import ApiKey
from loraplex_server.settings.config import ServerConfig

from .coordinator import SharedMeter, remote_learner
from .forwarding import with_forwarding
from .front_process import FrontProcess

_JOB_WAIT_S = 3600.0  # changes of adapters are awaited: other gateways would not know the job
_NAME = b"x-request-id"


@serve.ingress()
class Gateway(FrontProcess):
    """Checks keys, renders and tokenises prompts, and resolves each adapter name once.

    Ray calls the methods on one event loop.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: ServerConfig, engines: DeploymentHandle, coordinator: DeploymentHandle
    ) -> None:
        """Wait until the config's adapters are registered and an engine is ready."""
        self._config, self._coordinator = config, coordinator
        await coordinator.options(method_name="check_health").remote()
        learner = remote_learner(coordinator) if config.learning.n_threads > 0 else None
        http = config.http.model_copy(update={"job_wait_s": _JOB_WAIT_S})
        own_config = config.model_copy(update={"http": http})
        await self.start(own_config, engines, "gateway", self._meter_of, learner=learner)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray calls this hook after the constructor."""
        app, http = self.front, self._config.http
        return without_request_id(with_forwarding(app, self._coordinator, http, self._meter_of))

    def _meter_of(self, key: ApiKey) -> Meter:
        return SharedMeter(key, self._coordinator)


def without_request_id(app: ASGIApp) -> ASGIApp:
    """Return ``app`` without its own header. Ray passes the same id with the request."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != _NAME]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_on)

    return call
