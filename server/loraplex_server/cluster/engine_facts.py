"""What gateways have to know of the engines that they send requests to.

In an upgrade replicas of both versions run at once. A gateway takes the facts of its own version;
a replica answers only requests for its own base (``RemoteRequest.base``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.capabilities import EngineCapabilities
from loraplex_server.settings import ServerConfig

__all__ = ["EngineFacts", "fingerprint_of", "own_facts"]

_ASK_LIMIT_S = 5.0
_ASK_AGAIN_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What every replica of one version has in common, as the gateways need it."""

    config: str  # see ``fingerprint_of``
    base: BaseSpec  # without weights
    capabilities: EngineCapabilities
    eos_token_ids: frozenset[int]
    max_model_len: int


def fingerprint_of(config: ServerConfig) -> str:
    """Equal for servers whose engines are equal, as far as options and version say."""
    told = (installed_version("loraplex"), config.model, config.engine.model_dump_json())
    return hashlib.sha256(repr(told).encode()).hexdigest()


async def own_facts(
    engines: DeploymentHandle, everybody: DeploymentHandle, config: ServerConfig
) -> EngineFacts:
    """Waits for a replica with this configuration, and has one started where none runs.

    ``everybody``: see ``RemoteEngine``.
    """
    wanted = fingerprint_of(config)
    while True:
        found: Sequence[object] = ()
        try:
            one: EngineFacts = await engines.options(method_name="facts").remote()
            found = [one]
            if one.config != wanted:
                found = await everybody.broadcast("facts").results_async(timeout_s=_ASK_LIMIT_S)
        except RayTaskError:
            raise  # a mistake in the replica's code, not its death
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("an engine replica does not answer: %s", error)
        for facts in found:
            if isinstance(facts, EngineFacts) and facts.config == wanted:
                return facts
        _log.info("no engine replica of this version answers yet; asked again soon")
        await asyncio.sleep(_ASK_AGAIN_S)
