"""A frozen base that many adapters learn on: transformers' modules over the served weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex_training.errors import TrainingError

from .adapter import LearningAdapter, LoraShape
from .attention import attend
from .data import Datum
from .head import OutputHead, head_settings
from .packed_batch import PackedBatch, pack
from .routed_experts import RoutedMlp, RoutedRows
from .segmented_lora import GroupedLinear, LinearOfGroup, Segment
from .weight_cache import WeightCache

_ATTENTION = "loraplex_training"
_SLOT = "loraplex_training_batch"
_SINKS = "this base has attention sinks, on which adapters cannot be trained yet"


class BaseWeights(Protocol):
    """The weights of a base by the names of its checkpoint, as they are served."""

    @property
    def groups(self) -> Mapping[tuple[str, ...], Sequence[int]]:
        """The linears without the head, in groups that read one input, and their outputs."""

    @property
    def head(self) -> str:
        """The name of the output head."""

    def linear(self, names: tuple[str, ...]) -> Callable[[], Tensor]:
        """Return a reader of the stacked weights [Σ out, in] of a group or of the head."""

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the stacked biases [Σ out] of a group or of the head."""

    def embedding(self) -> Callable[[], Tensor]:
        """Return a reader of the input embedding [vocabulary, hidden]."""

    def tensor(self, name: str) -> Tensor:
        """Return another parameter, as stored."""


class _Held:
    """Holds what the attention modules see of a batch."""

    batch: PackedBatch
    prefix: Tensor | None = None  # of all adapters [n, layers, 2, kv heads, head_dim]
    seen: list[tuple[Tensor, Tensor]] | None = None  # keys and values of the layers, if asked for


class FrozenModel:
    """The base without its linears' weights, which are read for each product.

    One thread at a time. All tensors are on ``device``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: BaseWeights,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rest: Callable[[], None] = lambda: None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """``rest`` is called every few milliseconds, and may wait or raise.

        ``gradient_checkpointing``: a backward computes each layer again, so that a batch keeps the
        inputs of layers alone. It takes less memory and a third more time.

        Raises TrainingError for a base that cannot be computed so.
        """
        self.device, self.dtype = torch.device(device), dtype
        self._held = _Held()
        self._model = _skeleton(config)
        if any(name.endswith(".sinks") for name, _ in self._model.named_parameters()):
            raise TrainingError(_SINKS)
        text = self._model.config.get_text_config()
        self.linears: dict[str, tuple[int, int]] = {}
        """The linears that adapters may have: name → (in, out) features."""
        self._groups = []
        self._weights, self._cache = weights, WeightCache(dtype)
        product = _fast_product(self.device)
        for names, sizes in weights.groups.items():
            bias = weights.bias(names)
            bias = None if bias is None else bias.to(self.device, dtype)
            read = self._cache.reader(weights.linear(names))
            group = GroupedLinear(names, sizes, read, bias, rest, product)
            self._groups.append(group)
            for i, (name, n_out) in enumerate(zip(names, sizes, strict=True)):
                self.linears[name] = _in_features(self._model.get_submodule(name)), n_out
                self._model.set_submodule(name, LinearOfGroup(group, i))
        scale, cap = head_settings(text)
        head_bias = weights.bias((weights.head,))
        self.head = OutputHead(
            self._cache.reader(weights.linear((weights.head,))),
            rest,
            None if head_bias is None else head_bias.to(self.device),
            scale,
            cap,
        )
        self._embedding = weights.embedding()
        self._decoder: nn.Module = self._model.base_model
        self._fill(weights)
        self._set_attention()
        layers = (m for m in self._model.modules() if isinstance(m, GradientCheckpointingLayer))
        self.n_layers = len(list(layers))
        self.mlps = self._routable()
        """The MLPs that may have routed experts, by name."""
        acts = ("hidden_act", "hidden_activation", "activation_function")
        self.activation = next((str(a) for n in acts if (a := getattr(text, n, None))), "")
        if gradient_checkpointing:
            self._set_checkpointing()

    def hidden(
        self, batch: PackedBatch, adapters: Sequence[LearningAdapter], *, learning: bool = False
    ) -> Tensor:
        """Return the final states [T, hidden] of a batch with a segment for each adapter.

        ``learning``: with dropout, for a backward.
        """
        self._held.batch = batch
        prefixes = [a.prefix for a in adapters if a.prefix is not None]
        self._held.prefix = torch.cat(prefixes) if prefixes else None
        for group in self._groups:
            group.segments, group.factors = [], []
        for mlp in self.mlps.values():
            mlp.routed = []
        for (first, end), adapter in zip(batch.segments, adapters, strict=True):
            dropout = adapter.next_dropout() if learning else None
            gains, experts = adapter.gains, adapter.experts
            for name in experts:
                self.mlps[name].routed.append(RoutedRows(first, end, experts[name], dropout))
            for group in self._groups:
                members = tuple(i for i, name in enumerate(group.names) if name in adapter.factors)
                if not members:
                    continue
                scale = adapter.shape.scale
                group.segments.append(Segment(first, end, scale, members, dropout, bool(gains)))
                for name in (group.names[i] for i in members):
                    group.factors += [*adapter.factors[name], *([gains[name]] if gains else [])]
        output = self._decoder(
            inputs_embeds=self._embedded(batch.tokens)[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state.squeeze(0)
        return states

    def release(self) -> None:
        """Release the weights that are cached from one batch to the next."""
        self._cache.clear()

    @torch.no_grad()
    def keys_and_values(self, tokens: Tensor) -> Tensor:
        """Return what the base's attention keeps of tokens [n]: [n, layers, 2, kv heads, head_dim].

        Raises TrainingError if the layers differ in their sizes.
        """
        datum = Datum(tokens, tokens, torch.ones(len(tokens)))
        self._held.seen = []
        try:
            self.hidden(pack([[datum]], self.device), [LearningAdapter(LoraShape(), {})])
            layers = [torch.stack(each, 1) for each in self._held.seen]
        finally:
            self._held.seen = None
        if len({each.shape for each in layers}) != 1:
            raise TrainingError("the layers of this base keep keys of several sizes")
        return torch.stack(layers, 1).float()

    def router_logits(self, segment: tuple[int, int]) -> list[Tensor]:
        """Return the last forward's router logits of a segment's tokens, of each MLP."""
        return [mlp.logits[segment[0]] for mlp in self.mlps.values()]

    def weight(self, name: str) -> Tensor:
        """Return a float32 copy of a linear's weight [out, in]."""
        group = next(group for group in self._groups if name in group.names)
        weights = self._weights.linear(group.names)()
        return weights[group.parts[group.names.index(name)]].float().clone()

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings as the base's own module scales them."""
        rows = functional.embedding(tokens, self._embedding()).to(self.dtype)
        module = self._model.get_input_embeddings()
        scale = getattr(module, "embed_scale", None)  # Gemma 3
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)

    def _fill(self, weights: BaseWeights) -> None:
        """Give the rest of the modules their values."""
        aside = {self._model.get_input_embeddings(), self._model.get_output_embeddings()}
        for name, module in list(self._model.named_modules()):
            if module in aside:
                continue
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                value = weights.tensor(f"{name}.{leaf}" if name else leaf)
                value = value.to(self.device, self.dtype).view(parameter.shape)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, leaf, buffer.to(self.device))
            fast = _FastNorm.of(module)
            if fast is not None:
                self._model.set_submodule(name, fast)

    def _set_attention(self) -> None:
        if _ATTENTION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
        for module in self._model.modules():
            setattr(module, _SLOT, self._held)
            own: Any = getattr(module, "config", None)
            if hasattr(own, "_attn_implementation"):
                own._attn_implementation = _ATTENTION

    def _routable(self) -> dict[str, RoutedMlp]:
        """Put modules that can have experts in the place of the layers' MLPs of Llama's layout."""
        mlps = {}
        for name, module in list(self._model.named_modules()):
            layer = self._model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, GradientCheckpointingLayer) and RoutedMlp.fits(module):
                mlps[name] = RoutedMlp(name, module)
                self._model.set_submodule(name, mlps[name])
        return mlps

    def _set_checkpointing(self) -> None:
        """Checkpoint each layer as transformers does. The modules in it stay in evaluation."""
        for module in self._model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(
                    checkpoint, use_reentrant=False, preserve_rng_state=False
                )


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model with parameters on ``meta`` and computed buffers."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its linears are replaced
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _fast_product(device: torch.device) -> type[torch.autograd.Function] | None:
    if device.type == "cpu":
        return None
    from .device_lora import DeviceProduct

    return DeviceProduct


def _in_features(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    return int(module.get_parameter("weight").shape[0])  # GPT-2's Conv1D


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Map [1, heads, T, head_dim] to [1, T, heads, head_dim], as transformers calls it."""
    held: _Held = getattr(module, _SLOT)
    batch = held.batch
    if settings.get("s_aux") is not None:
        raise TrainingError(_SINKS)
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    if held.seen is not None:
        held.seen.append((k, v))
    if held.prefix is not None:
        own = held.prefix[:, module.layer_idx].to(k.dtype)  # type: ignore[index]
        k, v = torch.cat([own[:, 0], k]), torch.cat([own[:, 1], v])
    scale = settings.get("scaling")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    window, softcap = settings.get("sliding_window"), settings.get("softcap")
    return attend(batch, q, k, v, scale, window, softcap)[None], None


class _FastNorm(nn.Module):
    """An RMS norm with a gradient of its own, several times as fast as autograd's."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self._eps = weight, eps

    @classmethod
    def of(cls, module: nn.Module) -> "_FastNorm | None":
        """Return the same function as ``module``, or None if that is no plain RMS norm."""
        eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
        if eps is None or not isinstance(weight, Tensor) or weight.ndim != 1:
            return None
        fast = cls(weight.detach(), float(eps))
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        with torch.no_grad():
            same = torch.allclose(fast(x).float(), module(x).float(), rtol=1e-2, atol=1e-2)
        return fast if same else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RmsNorm.apply(x, self.weight, self._eps)  # type: ignore[no-untyped-call]
        return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale
        g = grads[0].to(scale.dtype) * weight
        g.addcmul_(unit, (g * unit).mean(-1, keepdim=True), value=-1)
        return g.mul_(scale).to(x.dtype), None, None
