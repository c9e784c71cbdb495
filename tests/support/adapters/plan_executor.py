"""Applies an AdapterPlan to a float32 transformers model by hooks, as the engine's oracle.

It says what a plan means, slowly and plainly: dense matrices, one adapter, no batching.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, ModulePlan, RoutingStrategy


def plan_logits(model: PreTrainedModel, plan: AdapterPlan, input_ids: Tensor) -> Tensor:
    """Return logits [batch, n_tokens, vocab] of the model with the plan applied."""
    with torch.inference_mode(), applied(model, plan):
        prefix = plan.prefix
        if prefix is None:
            return model(input_ids=input_ids).logits
        n_batch = input_ids.shape[0]
        if prefix.embeddings is not None:
            tokens = model.get_input_embeddings()(input_ids)
            virtual = prefix.embeddings.expand(n_batch, -1, -1)
            logits = model(inputs_embeds=torch.cat([virtual, tokens], dim=1)).logits
            return logits[:, virtual.shape[1] :]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            shaped = [t.transpose(0, 1).expand(n_batch, -1, -1, -1) for t in (keys, values)]
            cache.update(shaped[0], shaped[1], layer)
        return model(input_ids=input_ids, past_key_values=cache).logits


@contextmanager
def applied(model: PreTrainedModel, plan: AdapterPlan) -> Iterator[PreTrainedModel]:
    """Apply the plan's modules, experts, rows and dense weights within the block."""
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, weight in plan.replaced_weights.items():
            stack.enter_context(_replaced(modules[name], weight))
        for name, norm in plan.norms.items():
            for part in ("weight", "bias"):
                if (value := getattr(norm, part)) is not None:
                    stack.enter_context(_replaced(modules[name], value, part))
        for name, factors in plan.stacked.items():
            module, _, part = name.rpartition(".")
            weight = getattr(modules[module], part)
            changed = weight + (factors.left @ factors.right).view(weight.shape)
            stack.enter_context(_replaced(modules[module], changed, part))
        for name, module_plan in plan.modules.items():
            hook = _linear_hook(module_plan)
            if isinstance(modules[name], nn.Embedding):
                hook = _embedding_hook(module_plan)
            handle = modules[name].register_forward_hook(hook)
            stack.callback(handle.remove)
        if plan.embedding_rows:
            rows = _rows_hook(plan.embedding_rows)
            handle = model.get_input_embeddings().register_forward_hook(rows)
            stack.callback(handle.remove)
        if plan.head_rows:
            handle = model.get_output_embeddings().register_forward_hook(_head_hook(plan.head_rows))
            stack.callback(handle.remove)
        for name, block in plan.experts.items():
            stack.enter_context(_routed(modules, name, block))
        yield model


def apply_module(base: Callable[[Tensor], Tensor], plan: ModulePlan, x: Tensor) -> Tensor:
    """Return a module's output under its ``ModulePlan``."""
    if plan.in_scale is not None:
        x = x * plan.in_scale
    if plan.input_operator is not None:
        x = plan.input_operator.apply(x.flatten(0, -2)).reshape(x.shape)
    y = base(x)
    if plan.a is not None and plan.b is not None:
        y = y + x @ plan.a.t() @ plan.b.t()
    if plan.shared is not None:
        y = y + plan.shared.apply(x.flatten(0, -2)).reshape(y.shape)
    if plan.delta_operator is not None:
        bias = base(torch.zeros_like(x.flatten(0, -2)[:1]))
        delta = plan.delta_operator.apply(x.flatten(0, -2), lambda z: base(z) - bias)
        y = y + delta.reshape(y.shape)
    if plan.output_operator is not None:
        y = plan.output_operator.apply(y.flatten(0, -2)).reshape(y.shape)
    if plan.out_scale is not None:
        y = y * plan.out_scale
    return y if plan.bias is None else y + plan.bias


def _linear_hook(plan: ModulePlan) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        forward = type(module).forward
        return apply_module(lambda x: forward(module, x), plan, args[0])

    return hook


def _embedding_hook(plan: ModulePlan) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        assert plan.a is not None
        assert plan.b is not None
        return output + plan.a.t()[args[0]] @ plan.b.t()

    return hook


def _rows_hook(
    rows: Mapping[int, Tensor],
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for index, row in rows.items():
            output[args[0] == index] = row
        return output

    return hook


def _head_hook(
    rows: Mapping[int, Tensor],
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for index, row in rows.items():
            output[..., index] = args[0] @ row
        return output

    return hook


@contextmanager
def _replaced(module: nn.Module, value: Tensor, part: str = "weight") -> Iterator[None]:
    original = module.get_parameter(part)
    stored = value if value.shape == original.shape else value.t()
    setattr(module, part, nn.Parameter(stored.contiguous(), requires_grad=False))
    try:
        yield
    finally:
        setattr(module, part, original)


@contextmanager
def _routed(modules: Mapping[str, nn.Module], name: str, block: ExpertPlan) -> Iterator[None]:
    """Replace an MLP block or one projection by its routed experts, one after the other."""
    module = modules[name]
    original = module.forward

    def forward(hidden: Tensor) -> Tensor:
        weights = gate_weights(block, hidden)
        output = torch.zeros_like(original(hidden))
        for number, expert in enumerate(block.experts):
            with ExitStack() as stack:
                for target, plan in expert.items():
                    handle = modules[target].register_forward_hook(_linear_hook(plan))
                    stack.callback(handle.remove)
                result = (
                    original(hidden) if name not in expert else _alone(module, expert[name], hidden)
                )
            output = output + weights[..., number : number + 1] * result
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _alone(module: nn.Module, plan: ModulePlan, hidden: Tensor) -> Tensor:
    forward = type(module).forward
    return apply_module(lambda x: forward(module, x), plan, hidden)


def gate_weights(block: ExpertPlan, hidden: Tensor) -> Tensor:
    """Return weights […, n_experts], zero for experts that a token does not use."""
    logits = hidden.float() @ block.gate.t()
    if block.strategy is RoutingStrategy.ARROW:
        top = logits.abs().topk(block.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(dim=-1))
    p = torch.softmax(logits, dim=-1)
    if block.strategy is RoutingStrategy.DENSE:
        return p
    if block.strategy is RoutingStrategy.TOP_P:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = torch.where(before > block.top_p, torch.zeros_like(ordered), ordered)
        return torch.zeros_like(p).scatter(-1, order, kept)
    k = 1 if block.strategy is RoutingStrategy.SWITCH else block.top_k
    values, indices = p.topk(k, dim=-1)
    if block.strategy is RoutingStrategy.TOP_K:
        values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, indices, values)
