"""One short run of the model's own forward, which tells what it asks of attention and head.

Nothing is guessed from config fields: the attention function, the mask and the head are asked what
the model hands them. What the engine could not do as asked is refused here, by name.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .causal_mask import MaskFunction, window_of
from .errors import UnsupportedBase
from .logits_formula import LogitsFormula, probe_values

__all__ = [
    "AttentionSpec",
    "ModelTrace",
    "attention_as",
    "decoder_of",
    "max_positions_of",
    "trace_model",
]

_NAME = "loraplex_trace"
_SLOT = "loraplex_trace"
_N_TOKENS = 2
# What attention functions are told that changes nothing here, or is read from the mask instead.
_IGNORED = {"dropout", "position_ids", "sliding_window", "use_cache", "return_dict"}


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer asks of attention."""

    n_heads: int
    n_kv_heads: int
    head_dim: int  # of queries and keys
    v_head_dim: int  # of values, at most head_dim
    scale: float
    window: int | None  # positions that a query sees, its own included
    softcap: float | None
    sinks: Tensor | None  # [n_heads]: a score that takes its share of the softmax, and gives 0


@dataclass(frozen=True, slots=True)
class ModelTrace:
    layer_names: tuple[str, ...]  # of decoder layers, as "model.layers.0"
    attention: dict[str, AttentionSpec]  # attention module → what it asks, in layer order
    linears: frozenset[str]  # the linears that are called, not read
    logits: LogitsFormula
    max_positions: int


def trace_model(model: PreTrainedModel) -> ModelTrace:
    """Raises UnsupportedBase with the reason if the engine cannot do what the model asks."""
    _check_kind(model)
    recorder = _Recorder(model)
    head = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    probe = probe_values(vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attention_as(model, _NAME))
        stack.enter_context(recorder.attached())
        stack.enter_context(_hook(head, lambda _m, _a, out: probe.to(out.device).expand(out.shape)))
        token_ids = torch.arange(_N_TOKENS, device=model.device).unsqueeze(0) % vocab_size
        with torch.no_grad():
            try:
                output = model(
                    input_ids=token_ids,
                    attention_mask=torch.ones_like(token_ids),
                    use_cache=False,
                )
            except UnsupportedBase:
                raise
            except Exception as error:
                raise UnsupportedBase(
                    f"its forward does not run with an attention of ours: {error}"
                ) from error
    logits = LogitsFormula.fit(probe, output.logits[0, -1].cpu()).after(recorder.head_scale())
    layer_names = _layer_names(model, list(recorder.attention))
    _check_geometry(recorder.attention)
    return ModelTrace(
        layer_names, recorder.attention, recorder.linears(), logits, max_positions_of(model)
    )


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that makes hidden states of embeddings."""
    found = model.get_decoder()
    return model.get_submodule("model") if found is model else found


def max_positions_of(model: PreTrainedModel) -> int:
    """How many positions are served: those where position embeddings do not depend on the batch.

    "longrope" turns all positions otherwise as soon as one lies beyond the original length.
    """
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            longest = min(longest, int(kind["original_max_position_embeddings"]))
    return longest


@contextlib.contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Meanwhile the model looks attention up under this name."""
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _check_kind(model: PreTrainedModel) -> None:
    if getattr(model, "_is_stateful", False):
        raise UnsupportedBase(
            "it keeps a recurrent state (a state space model or a hybrid); only attention's keys "
            "and values are kept here between steps"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedBase("it has an encoder; only decoders are served")
    if model.get_output_embeddings() is None or model.get_input_embeddings() is None:
        raise UnsupportedBase("it has no output head or no token embedding")
    decoder = decoder_of(model)
    parameters = inspect.signature(decoder.forward).parameters
    for name in ("position_ids", "inputs_embeds"):
        if name not in parameters:
            raise UnsupportedBase(
                f"{type(decoder).__name__} takes no {name}, so rows of different requests "
                "cannot share a step"
            )


class _Recorder:
    """Takes down what the attention modules and linears of one model are called with."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._max_positions = max_positions_of(model)
        self._windows: dict[int, int | None] = {}  # by identity of the mask
        self._masks: list[Tensor] = []  # so that identities stay theirs
        self._called: set[str] = set()
        self._hidden: Tensor | None = None  # of the decoder, float64
        self._head_input: Tensor | None = None  # float64
        self.attention: dict[str, AttentionSpec] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS.register(_NAME, _traced_attention)
            ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _traced_mask)
        model = self._model
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                setattr(module, _SLOT, self)
                if isinstance(module, nn.Linear | Conv1D):
                    stack.enter_context(_hook(module, self._note_call(name)))
            stack.enter_context(_hook(decoder_of(model), self._widen_decoder))
            head = model.get_output_embeddings()
            stack.callback(head.register_forward_pre_hook(self._note_head_input).remove)
            try:
                yield
            finally:
                for module in model.modules():
                    delattr(module, _SLOT)

    def linears(self) -> frozenset[str]:
        """Those called, in the model's dtype, and their like: few tokens reach not every expert."""
        patterns = {_pattern(name) for name in self._called}
        return frozenset(
            name
            for name, module in self._model.named_modules()
            if _pattern(name) in patterns and isinstance(module, nn.Linear | Conv1D)
            if module.weight.dtype is self._model.dtype
        )

    def note_attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        told: dict[str, Any],
    ) -> None:
        name = self._names[id(module)]
        if name in self.attention:
            raise UnsupportedBase(f"{name} attends more than once in a step")
        scaling, softcap, sinks = (told.pop(key, None) for key in ("scaling", "softcap", "s_aux"))
        if told.pop("is_causal", True) is False:
            raise UnsupportedBase(f"{name} does not attend causally")
        for key_name, told_value in told.items():
            if key_name in _IGNORED or key_name.startswith("output_"):
                continue
            if told_value is not None:
                raise UnsupportedBase(
                    f"{name} asks attention for {key_name}, which is not served here"
                )
        head_dim, v_head_dim = query.shape[-1], value.shape[-1]
        if v_head_dim > head_dim:
            raise UnsupportedBase(
                f"{name} has values of {v_head_dim} and keys of {head_dim} elements a head; "
                "values may not be wider"
            )
        self.attention[name] = AttentionSpec(
            n_heads=query.shape[1],
            n_kv_heads=key.shape[1],
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            scale=float(head_dim**-0.5 if scaling is None else scaling),
            window=self._window(name, mask),
            softcap=None if softcap is None else float(softcap),
            sinks=None if sinks is None else sinks.detach().reshape(-1),
        )

    def _window(self, name: str, mask: object) -> int | None:
        function: MaskFunction | None = getattr(mask, _SLOT, None)
        if function is None:
            raise UnsupportedBase(
                f"{name} attends under a mask or bias that the model computes itself (as ALiBi)"
            )
        assert isinstance(mask, Tensor)
        if id(mask) not in self._windows:
            self._masks.append(mask)
            self._windows[id(mask)] = window_of(function, self._max_positions)
        return self._windows[id(mask)]

    def _note_call(self, name: str) -> _Hook:
        def note(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._called.add(name)

        return note

    def head_scale(self) -> float:
        """What the decoder's hidden states are multiplied by before the head reads them."""
        hidden, read = self._hidden, self._head_input
        if hidden is not None and read is not None and hidden.shape == read.shape:
            place = hidden.abs().argmax()
            scale = float(read.flatten()[place] / hidden.flatten()[place])
            has_bias = getattr(self._model.get_output_embeddings(), "bias", None) is not None
            if torch.allclose(read, hidden * scale, rtol=1e-6) and (scale == 1.0 or not has_bias):
                return scale
        raise UnsupportedBase(
            "its head does not read the final hidden states of its decoder, nor a multiple of them"
        )

    def _widen_decoder(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """In float64 a factor before the head shows exactly."""
        self._hidden = output.last_hidden_state.double()
        output.last_hidden_state = self._hidden
        return output

    def _note_head_input(self, head: nn.Module, inputs: Any) -> Any:
        self._head_input = inputs[0].double()
        return (inputs[0].to(head.weight.dtype),)


_Hook = Callable[[nn.Module, Any, Any], Any]


@contextlib.contextmanager
def _hook(module: nn.Module, function: _Hook) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _traced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """[1, heads, T, head_dim] in, zeros [1, T, heads, v_head_dim] out."""
    recorder: _Recorder = getattr(module, _SLOT)
    recorder.note_attention(module, query, key, value, attention_mask, told | {"scaling": scaling})
    n_rows, n_heads, n_tokens = query.shape[:3]
    return query.new_zeros(n_rows, n_tokens, n_heads, value.shape[-1]), None


def _traced_mask(
    q_length: int, kv_length: int, mask_function: MaskFunction, device: torch.device, **_: Any
) -> Tensor:
    """A mask of ones that carries the function which it would have been made by."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    setattr(mask, _SLOT, mask_function)
    return mask


def _layer_names(model: PreTrainedModel, attention: list[str]) -> tuple[str, ...]:
    """ "model.layers.0" of "model.layers.0.self_attn", and so on, every layer once."""
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    if len(attention) != n_layers:
        raise UnsupportedBase(
            f"of its {n_layers} layers {len(attention)} attend through transformers' attention "
            "interface; the others keep a state or attend in a way that is not served here"
        )
    split = [name.split(".") for name in attention]
    for depth, part in enumerate(split[0]):
        if part == "0" and all(
            len(parts) > depth and parts[depth] == str(index) for index, parts in enumerate(split)
        ):
            return tuple(".".join(parts[: depth + 1]) for parts in split)
    raise UnsupportedBase(f"its layers do not run in their order: {', '.join(attention[:4])} …")


def _check_geometry(attention: dict[str, AttentionSpec]) -> None:
    shapes = {(spec.n_kv_heads, spec.head_dim): name for name, spec in attention.items()}
    if len(shapes) > 1:
        listed = ", ".join(f"{n} x {width} ({name})" for (n, width), name in shapes.items())
        raise UnsupportedBase(
            f"its layers differ in key-value heads x head size: {listed}; one KV cache serves all"
        )


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
