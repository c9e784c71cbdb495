"""A forward that computes the common first tokens of all examples once in each step.

With short examples, the shared system turn is half of all tokens. The result is exact: the keys and
values of the prefix do not depend on later tokens, and their gradient is the sum over the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers.utils import ModelOutput

    from .batches import Batch

_WORTH_IT = 8  # tokens; below that a second forward costs more than it saves


def shared_prefix_len(examples: Sequence[Example]) -> int:
    """Return the number of shared first tokens, without tokens to learn; 0 if there are too few."""
    first = examples[0].tokens
    n = len(first)
    for example in examples:
        # The token before the first one to learn predicts it, so it cannot be shared either.
        n = min(n, len(example) - 1, example.learn.index(True) - 1)
        while n > 0 and example.tokens[:n] != first[:n]:
            n -= 1
    return n if n >= _WORTH_IT else 0


def logits_at(model: nn.Module, batch: Batch, positions: Tensor, n_shared: int) -> Tensor:
    """Return logits [rows, len(positions), vocabulary]; every position is ≥ ``n_shared``."""
    if n_shared == 0:
        output = model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            logits_to_keep=positions,
            use_cache=False,
        )
        return _logits(output)
    from transformers import DynamicCache

    cache_name = _cache_argument(model)
    cache = DynamicCache(config=model.config)
    model(
        input_ids=batch.tokens[:1, :n_shared],
        **{cache_name: cache},
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(batch.tokens.shape[0])
    output = model(
        input_ids=batch.tokens[:, n_shared:],
        attention_mask=batch.mask,
        **{cache_name: cache},
        use_cache=True,
        logits_to_keep=positions - n_shared,
    )
    return _logits(output)


def _cache_argument(model: nn.Module) -> str:
    """Return the name of the cache argument, which differs between releases of transformers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = inspect.signature(base.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _logits(output: ModelOutput) -> Tensor:
    logits: Tensor = output["logits"]
    return logits
