"""What gateways have to know of the engines that they send requests to.

In an upgrade replicas of both versions run at once. A gateway takes the facts of its own version,
the Desk those of any that serves its model; a replica answers only requests for its own base
(``RemoteRequest.base``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.capabilities import EngineCapabilities
from loraplex_server.settings import ServerConfig

__all__ = ["EngineFacts", "facts_of_model", "fingerprint_of", "model_of", "own_facts"]

_ASK_LIMIT_S = 5.0
_ASK_AGAIN_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What every replica of one version has in common, as the gateways need it."""

    config: str  # see ``fingerprint_of``
    model: str  # see ``model_of``
    base: BaseSpec  # without weights
    capabilities: EngineCapabilities
    eos_token_ids: frozenset[int]
    max_model_len: int
    max_positions: int  # that the base is right up to


def fingerprint_of(config: ServerConfig) -> str:
    """Equal for servers whose engines are equal, as far as options and version say."""
    return _digest(model_of(config), config.engine.model_dump_json())


def model_of(config: ServerConfig) -> str:
    """Equal for engines of one model and version of the package, whatever their options."""
    return _digest(installed_version("loraplex"), config.model)


async def own_facts(
    engines: DeploymentHandle, everybody: DeploymentHandle, config: ServerConfig
) -> EngineFacts:
    """Waits for a replica with this configuration, and has one started where none runs.

    ``everybody``: see ``RemoteEngine``.
    """
    wanted = fingerprint_of(config)
    return await _facts(engines, everybody, lambda facts: facts.config == wanted)


async def facts_of_model(
    engines: DeploymentHandle, everybody: DeploymentHandle, config: ServerConfig
) -> EngineFacts:
    """As ``own_facts``, and does not wait where a replica with other engine options answers.

    What follows from the options is then of ``config``. One of another version of the package
    is waited out: its facts may mean something else.
    """
    wanted = model_of(config)
    # Of an earlier package, facts may lack a field.
    found = await _facts(engines, everybody, lambda f: getattr(f, "model", None) == wanted)
    return found if found.config == fingerprint_of(config) else _with_options(found, config)


async def _facts(
    engines: DeploymentHandle, everybody: DeploymentHandle, fit: Callable[[EngineFacts], bool]
) -> EngineFacts:
    while True:
        found: Sequence[object] = ()
        try:
            one: EngineFacts = await engines.options(method_name="facts").remote()
            found = [one]
            if not fit(one):
                found = await everybody.broadcast("facts").results_async(timeout_s=_ASK_LIMIT_S)
        except RayTaskError:
            raise  # a mistake in the replica's code, not its death
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("an engine replica does not answer: %s", error)
        for facts in found:
            if isinstance(facts, EngineFacts) and fit(facts):
                return facts
        _log.info("no engine replica of this version answers yet; asked again soon")
        await asyncio.sleep(_ASK_AGAIN_S)


def _with_options(facts: EngineFacts, config: ServerConfig) -> EngineFacts:
    """Where the number of ranks differs, what cannot be cut is refused by the engines alone."""
    options, known = config.engine, facts.capabilities
    n_ranks = 1 if known.layout is None else known.layout.size
    return replace(
        facts,
        config=fingerprint_of(config),
        capabilities=replace(
            known,
            max_rank=options.max_lora_rank,
            layout=known.layout if n_ranks == options.tensor_parallel_size else None,
        ),
        max_model_len=options.max_model_len or facts.max_positions,
    )


def _digest(*told: object) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()
