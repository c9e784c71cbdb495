"""Records the calls of attention and linears in one run of a model's forward."""

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

from loraplex_server.model.errors import UnsupportedBase

_NAME = "loraplex_trace"
_SLOT = "loraplex_trace"
# Arguments of attention functions that have no effect here or are read from the mask.
_IGNORED = {"dropout", "position_ids", "sliding_window", "use_cache", "return_dict"}
_Hook = Callable[[nn.Module, Any, Any], Any]
# transformers' convention: broadcast indices (batch, head, query, key) → bool, True if visible
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of one layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int  # of queries and keys
    v_head_dim: int  # of values, at most head_dim
    scale: float
    window: int | None  # positions that a query sees, including its own
    softcap: float | None
    sinks: Tensor | None  # [n_heads]: an extra score in the softmax, whose value is 0


class CallRecorder:
    """Records the arguments of a model's attention modules, and which linears are called."""

    def __init__(self, model: PreTrainedModel, decoder: nn.Module, max_positions: int) -> None:
        self._model, self._decoder = model, decoder
        self._names = {id(module): name for name, module in model.named_modules()}
        self._max_positions = max_positions
        self._windows: dict[int, int | None] = {}  # by identity of the mask
        self._masks: list[Tensor] = []  # kept alive, so that identities stay unique
        self._called: set[str] = set()
        self._hidden: Tensor | None = None  # the decoder's output, float64
        self._head_input: Tensor | None = None  # float64
        self.attention: dict[str, AttentionSpec] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the context is open."""
        if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS.register(_NAME, _traced_attention)
            ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _traced_mask)
        model = self._model
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                setattr(module, _SLOT, self)
                if isinstance(module, nn.Linear | Conv1D):
                    stack.callback(module.register_forward_hook(self._note_call(name)).remove)
            stack.callback(self._decoder.register_forward_hook(self._widen_decoder).remove)
            head = model.get_output_embeddings()
            stack.callback(head.register_forward_pre_hook(self._note_head_input).remove)
            try:
                yield
            finally:
                for module in model.modules():
                    delattr(module, _SLOT)

    def linears(self) -> frozenset[str]:
        """Return the called linears, and the same ones of layers and experts that did not run."""
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
        options: dict[str, Any],
    ) -> None:
        name = self._names[id(module)]
        if name in self.attention:
            raise UnsupportedBase(f"{name} attends more than once in a step")
        scaling, softcap, sinks = (
            options.pop(key, None) for key in ("scaling", "softcap", "s_aux")
        )
        if options.pop("is_causal", True) is False:
            raise UnsupportedBase(f"{name} does not attend causally")
        for key_name, option in options.items():
            if key_name in _IGNORED or key_name.startswith("output_"):
                continue
            if option is not None:
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
        """The name of the recording attention in transformers' registry."""
        return _NAME

    def head_scale(self) -> float:
        """Return the factor between the decoder's hidden states and the head's input."""
        hidden, read = self._hidden, self._head_input
        if hidden is not None and read is not None and hidden.shape == read.shape:
            index = hidden.abs().argmax()
            scale = float(read.flatten()[index] / hidden.flatten()[index])
            has_bias = getattr(self._model.get_output_embeddings(), "bias", None) is not None
            if torch.allclose(read, hidden * scale, rtol=1e-6) and (scale == 1.0 or not has_bias):
                return scale
        raise UnsupportedBase(
            "its head does not read the final hidden states of its decoder, nor a multiple of them"
        )

    def _widen_decoder(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Use float64, in which a factor before the head shows exactly."""
        self._hidden = output.last_hidden_state.double()
        output.last_hidden_state = self._hidden
        return output

    def _note_head_input(self, head: nn.Module, inputs: Any) -> Any:
        self._head_input = inputs[0].double()
        return (inputs[0].to(head.weight.dtype),)


def _traced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Map [1, heads, T, head_dim] to zeros [1, T, heads, v_head_dim]."""
    recorder: CallRecorder = getattr(module, _SLOT)
    recorder.note_attention(
        module, query, key, value, attention_mask, options | {"scaling": scaling}
    )
    n_rows, n_heads, n_tokens = query.shape[:3]
    return query.new_zeros(n_rows, n_tokens, n_heads, value.shape[-1]), None


def _traced_mask(
    q_length: int, kv_length: int, mask_function: MaskFunction, device: torch.device, **_: Any
) -> Tensor:
    """Return a mask of ones with the mask function as an attribute."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    setattr(mask, _SLOT, mask_function)
    return mask


@contextlib.contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model look attention up under ``name`` while the context is open."""
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


def window_of(mask_function: MaskFunction, n_positions: int) -> int | None:
    """Return the sliding window of a causal mask; None if a query sees all earlier positions.

    Evaluates queries all over the context, which tells windows from chunks and blocks. Raises
    UnsupportedBase for anything but a causal window.
    """
    last = n_positions - 1
    rows = sorted({0, 1, last // 3, last // 2, last // 2 + 1, max(last - 1, 0), last})
    queries = torch.tensor(rows).view(1, 1, -1, 1)
    keys = torch.arange(n_positions).view(1, 1, 1, -1)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    try:
        visible = mask_function(zero, zero, queries, keys)
    except Exception as error:
        raise UnsupportedBase(f"its attention mask cannot be evaluated ({error})") from error
    visible = visible.expand(1, 1, len(rows), n_positions)
    window = int(visible[0, 0, -1].sum())
    expected = (keys <= queries) & (keys > queries - window)
    if window < 1 or not torch.equal(visible, expected):
        raise UnsupportedBase(
            "its attention mask is neither causal nor a causal sliding window (a mask by chunk or "
            "block, or a bidirectional one)"
        )
    return None if window >= n_positions else window
