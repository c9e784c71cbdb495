"""Parameters of sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request, validated by the HTTP routes.

    Logits are changed in this order: logit_bias, repetition, presence and frequency penalties,
    bad_words, allowed_token_ids, min_tokens, the grammar's mask, temperature, top_k, top_p, min_p.
    ``logprobs`` are computed from the raw logits.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int | None = None  # same seed and request → same tokens, whatever else is in the batch
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0  # over output only
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not occur
    allowed_token_ids: frozenset[int] | None = None  # None: all
    stop_token_ids: frozenset[int] = frozenset()  # besides the model's end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # None = off, k = chosen token and the k most likely
    prompt_logprobs: int | None = None  # None = off, k = each prompt token and the k most likely

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
