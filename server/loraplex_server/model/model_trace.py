"""One short run of the model's own forward, which records its calls of attention and head.

Nothing is guessed from config fields: the attention function, the mask and the head are asked what
the model hands them. What the engine could not do as asked is refused here, by name.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .call_recorder import AttentionSpec, CallRecorder, attention_as, call_hook
from .errors import UnsupportedBase
from .logits_formula import LogitsFormula, probe_values

__all__ = ["ModelTrace", "decoder_of", "max_positions_of", "trace_model"]

_N_TOKENS = 2


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
    recorder = CallRecorder(model, decoder_of(model), max_positions_of(model))
    head = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    probe = probe_values(vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attention_as(model, recorder.name))
        stack.enter_context(recorder.attached())
        stack.enter_context(
            call_hook(head, lambda _m, _a, out: probe.to(out.device).expand(out.shape))
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
