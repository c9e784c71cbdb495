"""The facts about engines that gateways need.

During an upgrade replicas of both versions run. A gateway takes the facts of its own version, the
coordinator those of any version that serves its model. A replica answers only requests for its own
base (``RemoteRequest.base``).

The functions of a ``BaseSpec`` that read weights hold the engine's memory, so a spec leaves the
engine replica without them. A gateway adds its own, which read the model's files. Most adapter
families never read a weight.
"""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NoReturn

import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.adapters.capabilities import EngineCapabilities
from loraplex_server.model.loading.loader import Lazy
from loraplex_server.model.vision.layouts import auto_class
from loraplex_server.settings.config import ServerConfig

_ANSWER_TIMEOUT_S = 5.0
_RETRY_S = 1.0
_log = logging.getLogger(__name__)


def without_weights(base: BaseSpec) -> BaseSpec:
    """Return a spec that may cross processes."""
    return replace(
        base, weight=_elsewhere, stored=_elsewhere, bias=_elsewhere, parameter=_elsewhere
    )


def with_weights_of(base: BaseSpec, path: Path, dtype: torch.dtype) -> BaseSpec:
    """Return a spec that reads weights from ``path``, in the engine's ``dtype``."""

    def load() -> BaseSpec:
        model = auto_class(path).from_pretrained(path, dtype=dtype, local_files_only=True)
        return BaseSpec.of(model, base.model_id)

    lazy = Lazy(load)
    return replace(
        base,
        weight=lambda name: lazy.get().weight(name),
        stored=lambda name: lazy.get().stored(name),
        bias=lambda name: lazy.get().bias(name),
        parameter=lambda name: lazy.get().parameter(name),
    )


def _elsewhere(name: str) -> NoReturn:
    raise AssertionError(f"the weights of {name} are in another process")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The facts that all replicas of one version share."""

    config: str  # see ``fingerprint_of``
    model: str  # see ``model_of``
    base: BaseSpec  # without weights
    capabilities: EngineCapabilities
    eos_token_ids: frozenset[int]
    max_model_len: int
    max_positions: int  # the longest context that the base was made for


def fingerprint_of(config: ServerConfig) -> str:
    """Return a digest that is equal for engines with equal options and package version."""
    return _digest(model_of(config), config.engine.model_dump_json())


def model_of(config: ServerConfig) -> str:
    """Return a digest that is equal for engines of one model and package version."""
    return _digest(installed_version("loraplex"), config.model)


async def find_facts(
    engines: DeploymentHandle,
    everybody: DeploymentHandle,
    config: ServerConfig,
    *,
    any_version: bool,
) -> EngineFacts:
    """Wait for a replica with this configuration, and start one where none runs.

    With ``any_version``, a replica of the same model and package answers too, whatever its engine
    options. The facts that follow from options are then those of ``config``.
    ``everybody``: see ``RemoteEngine``.
    """
    fingerprint, model = fingerprint_of(config), model_of(config)

    def fits(facts: object) -> bool:
        if not isinstance(facts, EngineFacts):
            return False
        # Facts of an earlier package may lack a field.
        return facts.config == fingerprint or (
            any_version and getattr(facts, "model", None) == model
        )

    while True:
        answers: Sequence[object] = ()
        try:
            answers = [await engines.options(method_name="facts").remote()]
            if not fits(answers[0]):
                broadcast = everybody.broadcast("facts")
                answers = await broadcast.results_async(timeout_s=_ANSWER_TIMEOUT_S)
        except RayTaskError:
            raise  # a mistake in the replica's code, not its death
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("an engine replica does not answer: %s", error)
        for facts in filter(fits, answers):
            assert isinstance(facts, EngineFacts)
            return facts if facts.config == fingerprint else _with_options(facts, config)
        _log.info("no engine replica of this version answers yet; asked again soon")
        await asyncio.sleep(_RETRY_S)


def _with_options(facts: EngineFacts, config: ServerConfig) -> EngineFacts:
    """If the number of ranks differs, only engines refuse adapters that cannot be split."""
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


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
