"""Answers training clients of Tinker: steps on an adapter, and checkpoints of it."""

import contextlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraplex_adapter_store.errors import UnknownAdapter
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.names.selector import NameRef
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.adapters.tinker.checkpoints import Checkpoint, Run, check_checkpoint_name
from loraplex_server.adapters.tinker.sessions import Sampler, Session, TrainingRun
from loraplex_server.api.adapter_path import new_name
from loraplex_server.api.state import AppState, in_change_thread
from loraplex_server.errors import ApiError, invalid
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum, Loss
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.losses import cross_entropy, importance_sampling, ppo

from .tinker_messages import ForwardBackwardRequest, WireDatum, forward_backward_output
from .tinker_protocol import AdamParams, CreateModelBody, LoadWeightsBody, SaveForSamplerBody

MAX_CALL_TOKENS = 1 << 16  # of one forward
_ALPHA = 32.0  # of every LoRA, as in Tinker
_CLIPS = {"clip_low_threshold": "low", "clip_high_threshold": "high"}
_LOSSES: Mapping[str, Loss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
}
Json = dict[str, object]


def thread_of(state: AppState) -> TrainingThread:
    """Raises ApiError (403) if this server trains nothing."""
    if not trains(state):
        raise ApiError(
            403,
            "training is not enabled on this server; start it with --allow-training",
            code="feature_not_enabled",
        )
    assert state.makers.training_thread is not None
    return state.makers.training_thread


def trains(state: AppState) -> bool:
    """Return True if clients may train here."""
    return state.makers.training_thread is not None and state.config.learning.allow_training


def check_base(state: AppState, name: str) -> None:
    """Raises ApiError (400) for another model than the one that is served."""
    if name not in (*state.resolver.base_names, "base"):
        raise invalid(
            f"base_model {name[:128]!r} is not served; this server has {state.resolver.base_name}",
            "base_model",
        )


def new_run(session: Session, number: int, body: CreateModelBody) -> Run:
    """Raises ApiError (400)."""
    config = body.lora_config
    if not (config.train_attn or config.train_mlp):
        raise invalid(
            "attention and MLP layers can be trained, the unembedding cannot; set train_attn or "
            "train_mlp",
            "lora_config",
        )
    return Run(
        f"{session.id}:train:{number}",
        body.base_model,
        config.rank,
        config.train_attn,
        config.train_mlp,
        body.user_metadata,
        time.time(),
    )


async def create(
    state: AppState, session: Session, run: Run, seed: int | None, body: LoadWeightsBody | None
) -> Json:
    """Make the run's adapter; from a checkpoint if ``body`` names one. Raises ApiError."""
    limit = state.config.engine.max_lora_rank
    if run.rank > limit:
        raise invalid(
            f"rank is {run.rank}, this server serves at most {limit} (--max-lora-rank)",
            "lora_config.rank",
        )
    training = state.sessions.add_run(session, run)
    try:
        thread = thread_of(state)
        targets = await thread.run(session.tenant, partial(_targets, run))
        shape = LoraShape(run.rank, _ALPHA, targets)
        seed = secrets.randbits(62) if seed is None else seed
        training.adapter = await thread.new_adapter(shape, seed)
        if body is not None:
            await _load(state, training, body)
    except BaseException:
        session.runs.pop(run.id, None)
        raise
    if body is not None:
        return {"type": "load_weights", "path": body.path, "model_id": run.id}
    return {"type": "create_model", "model_id": run.id}


async def load(state: AppState, training: TrainingRun, body: LoadWeightsBody) -> Json:
    """Load a checkpoint into an open run. Raises ApiError."""
    await _load(state, training, body)
    return {"type": "load_weights", "path": body.path, "model_id": training.id}


async def forward_backward(
    state: AppState, training: TrainingRun, request: ForwardBackwardRequest
) -> bytes:
    """Raises ApiError (400) for data that the loss cannot take."""
    if request.problem is not None:
        raise request.problem
    loss = _loss(request.loss, request.config)
    n_tokens = sum(len(each.tokens) for each in request.data)
    if not 0 < n_tokens <= MAX_CALL_TOKENS:
        raise invalid(
            f"the call has {n_tokens} tokens, 1 to {MAX_CALL_TOKENS} are accepted; send less at "
            "once",
            "data",
        )
    data = [_datum(state, request.loss, f"data[{i}]", each) for i, each in enumerate(request.data)]
    work = Work(training.adapter, data, loss)
    outcome = await thread_of(state).forward_backward(
        training.session.tenant, work, backward=not request.forward_only
    )
    return forward_backward_output([each.numpy() for each in outcome.logprobs], outcome.loss)


async def optim_step(state: AppState, training: TrainingRun, params: AdamParams) -> Json:
    adam = Adam(
        params.learning_rate,
        params.beta1,
        params.beta2,
        params.eps,
        params.weight_decay,
        params.grad_clip_norm if params.grad_clip_norm > 0 else None,
    )
    norm = await thread_of(state).step(training.session.tenant, training.adapter, adam)
    return {"metrics": {"grad_norm": norm}}


async def save_weights(
    state: AppState,
    training: TrainingRun,
    name: str,
    *,
    life_s: int | None,
    overwrite: bool,
    metadata: dict[str, str] | None,
) -> Json:
    """Save weights and moments. Raises ApiError."""
    session = training.session
    card = _card(training, "weights", name, life_s, metadata)
    state.checkpoints.check_room(session.tenant, card.path, overwrite=overwrite)
    tensors = await thread_of(state).run(session.tenant, lambda _: training.adapter.state())

    def save() -> None:
        if (tenant := session.access.tenant) is not None:
            n_new = sum(each.nbytes for each in tensors.values())
            session.access.quota.check_bytes(state.store.n_bytes_beside(tenant, None) + n_new)
        run = replace(training.run, used=time.time())
        state.checkpoints.save(session.tenant, run, card, tensors)

    await in_change_thread(state, save, session.access)
    return {"type": "save_weights", "path": card.path}


async def save_for_sampler(
    state: AppState, training: TrainingRun, body: SaveForSamplerBody
) -> Json:
    """Register the weights as an adapter; without a name, for one sampling session.

    Raises ApiError.
    """
    session, folder = training.session, training.run.folder
    if body.path is not None:
        card = _card(training, "sampler_weights", body.path, body.ttl_seconds, body.user_metadata)
        state.checkpoints.check_room(session.tenant, card.path, overwrite=True)
        name = f"tinker/{folder}/{body.path}"
        digest = await _register(state, training, name, card.expires)
        card = replace(card, adapter=None if digest is None else name)
        run = replace(training.run, used=time.time())
        save = partial(state.checkpoints.save, session.tenant, run, card, None)
        await in_change_thread(state, save, session.access)
        return {"type": "save_weights_for_sampler", "path": card.path}
    name = f"tinker/{folder}"
    if name not in session.cleanups:
        session.cleanups[name] = partial(delete_adapter, state, session.access, name)
    digest = await _register(state, training, name, None)
    ref = None if digest is None else NameRef(name, None if body.kind == "inflight" else digest)
    sampler = Sampler(f"{session.id}:sample:{body.sampling_session_seq_id}", ref)
    session.add_sampler(sampler)
    return {"type": "save_weights_for_sampler", "sampling_session_id": sampler.id}


async def delete_adapter(state: AppState, access: AdapterAccess, name: str) -> None:
    """Delete an adapter of a tenant, if it still exists. Raises ApiError."""

    def delete() -> None:
        with contextlib.suppress(UnknownAdapter):
            state.store.start_delete(access.own(name))

    await in_change_thread(state, delete, access)


async def _load(state: AppState, training: TrainingRun, body: LoadWeightsBody) -> None:
    tenant = training.session.tenant
    saved, tensors = await in_change_thread(
        state, partial(state.checkpoints.load, tenant, body.path), training.session.access
    )
    ours = training.run
    shapes = [(run.rank, run.train_attn, run.train_mlp) for run in (saved, ours)]
    if shapes[0] != shapes[1]:
        raise invalid(
            f"{body.path} has rank {saved.rank} (train_attn {saved.train_attn}, train_mlp "
            f"{saved.train_mlp}), this client rank {ours.rank} ({ours.train_attn}, "
            f"{ours.train_mlp}); create a client from the checkpoint",
            "path",
        )
    if not body.optimizer:
        tensors = {name: each for name, each in tensors.items() if name.startswith("now.")}
    adapter = training.adapter
    await thread_of(state).run(tenant, lambda _: adapter.load_state(tensors))


async def _register(
    state: AppState, training: TrainingRun, name: str, expires: float | None
) -> str | None:
    """Store the adapter and return its digest; None if it still equals the base."""
    session, adapter = training.session, training.adapter
    stored = await new_name(name, session.access, state, param="path")
    options = PutOptions(
        expires=expires,
        provenance={"source": "trained", "training": {"run": training.id, "api": "tinker"}},
        quota=session.access.quota,
    )
    config: Mapping[str, Any] = adapter.peft_config(state.model.name)
    tensors = await thread_of(state).run(session.tenant, lambda _: _tensors(adapter))
    if tensors is None:
        return None
    put = partial(state.store.put_tensors, stored, config, tensors, options=options)
    return (await in_change_thread(state, put, session.access)).digest


def _tensors(adapter: LearningAdapter) -> dict[str, Tensor] | None:
    """Return copies of the factors; None while every product is zero, as at the start."""
    tensors = adapter.tensors()
    return tensors if any(bool(t.any()) for n, t in tensors.items() if ".lora_B." in n) else None


def _card(
    training: TrainingRun,
    kind: str,
    name: str,
    life_s: int | None,
    metadata: dict[str, str] | None,
) -> Checkpoint:
    now = time.time()
    return Checkpoint(
        training.id,
        "weights" if kind == "weights" else "sampler_weights",
        check_checkpoint_name(name),
        now,
        None if life_s is None else now + life_s,
        metadata=metadata,
    )


def _targets(run: Run, engine: TrainingEngine) -> tuple[str, ...]:
    """Return the ends of the names of the linears that the run trains."""
    if run.train_attn and run.train_mlp:
        return ("all-linear",)
    chosen = {n.rpartition(".")[2] for n in engine.model.linears if _is_attn(n) == run.train_attn}
    return tuple(sorted(chosen))


def _is_attn(name: str) -> bool:
    return "attn" in name or "attention" in name


def _loss(name: str, config: Mapping[str, float | str]) -> Loss:
    """Return the loss, which reads its weights from ``extra``. Raises ApiError (400)."""
    if name not in _LOSSES:
        raise invalid(
            f"the loss {name[:40]!r} is unknown; known: {', '.join(_LOSSES)}, and your own through "
            "forward_backward_custom",
            "loss_fn",
        )
    settings = {}
    for key, value in config.items():
        if name != "ppo" or key not in _CLIPS or not isinstance(value, float):
            raise invalid(
                f"{name} has no setting {key[:40]!r} = {value!r}; ppo takes {', '.join(_CLIPS)}",
                "loss_fn_config",
            )
        settings[_CLIPS[key]] = value
    loss = partial(_LOSSES[name], **settings)

    def weighted(logprobs: Tensor, datum: Datum) -> Tensor:
        return loss(logprobs, replace(datum, weights=datum.extra["weights"]))

    return weighted


def _datum(state: AppState, loss: str, where: str, wire: WireDatum) -> Datum:
    """Return the datum with weights of 1, so that every position has a log-probability."""
    n, limit = len(wire.tokens), state.engine.max_model_len
    if not 0 < n <= limit:
        raise invalid(f"{where} has {n} tokens, 1 to {limit} are accepted", where)
    needed = {"target_tokens"} | ({"logprobs", "advantages"} if loss != "cross_entropy" else set())
    known = needed | {"weights"}
    if not needed <= set(wire.inputs) <= known:
        raise invalid(
            f"{where}: {loss} takes {', '.join(sorted(known))}, not "
            f"{', '.join(sorted(wire.inputs)) or 'nothing'}",
            where,
        )
    for name, array in wire.inputs.items():
        if len(array) != n:
            raise invalid(f"{where}: {name} has {len(array)} values for {n} tokens", where)
        if name == "target_tokens" and array.dtype != "int64":
            raise invalid(f"{where}: target_tokens must be int64", where)
    tensors = {name: torch.from_numpy(array) for name, array in wire.inputs.items()}
    targets = tensors.pop("target_tokens")
    ids = torch.from_numpy(wire.tokens)
    for name, each in (("tokens", ids), ("target_tokens", targets)):
        if int(each.min()) < 0 or int(each.max()) >= state.text.vocab_size:
            raise invalid(
                f"{where}: {name} has ids outside of 0 to {state.text.vocab_size - 1}", where
            )
    extra = {name: each.float() for name, each in tensors.items()}
    if not all(bool(each.isfinite().all()) for each in extra.values()):
        raise invalid(f"{where} has values that are not finite", where)
    ones = torch.ones(n)
    return Datum(ids, targets, ones, {"weights": ones, **extra})
