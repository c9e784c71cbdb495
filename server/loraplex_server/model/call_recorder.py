"""Records how a model's forward calls attention and its linears, in one run."""

from __future__ import annotations

import contextlib
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

__all__ = ["AttentionSpec", "CallRecorder", "attention_as", "call_hook"]

_NAME = "loraplex_trace"
_SLOT = "loraplex_trace"
# Arguments of attention functions without effect here, or read from the mask instead.
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


class CallRecorder:
    """Takes down what the attention modules and linears of one model are called with."""

    def __init__(self, model: PreTrainedModel, decoder: nn.Module, max_positions: int) -> None:
        self._model, self._decoder = model, decoder
        self._names = {id(module): name for name, module in model.named_modules()}
        self._max_positions = max_positions
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
                    stack.enter_context(call_hook(module, self._note_call(name)))
            stack.enter_context(call_hook(self._decoder, self._widen_decoder))
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

    @property
    def name(self) -> str:
        """Under which the model finds the attention that records."""
        return _NAME

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
def call_hook(module: nn.Module, function: _Hook) -> Iterator[None]:
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
    recorder: CallRecorder = getattr(module, _SLOT)
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


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
