"""Traces the calls of attention and head in one short run of the model's own forward.

The trace records the arguments of attention, mask and head instead of reading config fields. It
refuses unsupported arguments with an error that names them.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_server.model.errors import UnsupportedBase

from .call_recorder import AttentionSpec, CallRecorder, attention_as

_N_TOKENS = 2


_TOLERANCE = 1e-5  # relative: some models compute logits in float32


@dataclass(frozen=True, slots=True)
class LogitsFormula:
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_monotonic(self) -> bool:
        """Return True if logits have the order of the head's output, ties included."""
        return self.softcap is None and self.scale > 0

    def after(self, factor: float) -> LogitsFormula:
        """Return the formula for an output that is still to be multiplied by ``factor``."""
        return LogitsFormula(self.scale * factor, self.softcap)

    def finish(self, out: Tensor) -> Tensor:
        """Turn the head's output, float32, into logits in place."""
        if self.softcap is None:
            return out if self.scale == 1.0 else out.mul_(self.scale)
        return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    @staticmethod
    def fit(head_output: Tensor, logits: Tensor) -> LogitsFormula:
        """Return the formula of the model's logits of ``probe_values``. Raises UnsupportedBase."""
        x, y = head_output.double(), logits.double()
        nearest, farthest = x.abs().argmin(), x.argmax()
        scale, cap = float(y[nearest] / x[nearest]), float(y[farthest])
        for formula in (LogitsFormula(scale), LogitsFormula(scale, abs(cap) or None)):
            if _agrees(y, formula.finish(x.clone())):
                return formula
        raise UnsupportedBase(
            "its logits are neither the head's output times a constant nor a soft cap of that: "
            f"of {float(x[nearest]):g} it makes {float(y[nearest]):g}, of {float(x[farthest]):g} "
            f"{cap:g}"
        )


def probe_values(n: int) -> Tensor:
    """Return float64 [n] from -10⁴ to 10⁴, dense around 0, to show both scale and cap."""
    half = torch.logspace(-3, 4, n - n // 2, dtype=torch.float64)
    return torch.cat([-half[: n // 2].flip(0), half])


def _agrees(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual - expected).abs() <= _TOLERANCE * expected.abs() + 1e-12).all())


@dataclass(frozen=True, slots=True)
class ModelTrace:
    layer_names: tuple[str, ...]  # decoder layers, such as "model.layers.0"
    attention: dict[str, AttentionSpec]  # by attention module, in layer order
    linears: frozenset[str]  # linears that are called, not only read
    logits: LogitsFormula
    max_positions: int


def trace_model(model: PreTrainedModel) -> ModelTrace:
    """Trace the model. Raises UnsupportedBase with the reason if it cannot be served."""
    _check_kind(model)
    recorder = CallRecorder(model, decoder_of(model), max_positions_of(model))
    head = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    probe = probe_values(vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attention_as(model, recorder.name))
        stack.enter_context(recorder.attached())
        stack.callback(
            head.register_forward_hook(
                lambda _m, _a, out: probe.to(out.device).expand(out.shape)
            ).remove
        )
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
    """Return the submodule that maps embeddings to hidden states."""
    decoder = model.get_decoder()
    return model.get_submodule("model") if decoder is model else decoder


def max_positions_of(model: PreTrainedModel) -> int:
    """Return how many positions have embeddings that do not depend on the batch.

    "longrope" changes all positions once one of them exceeds the original length.
    """
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            longest = min(longest, int(kind["original_max_position_embeddings"]))
    return longest


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


def _layer_names(model: PreTrainedModel, attention: list[str]) -> tuple[str, ...]:
    """Return the layers of the attention modules, such as "model.layers.0"."""
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
