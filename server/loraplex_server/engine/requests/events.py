"""Events of the engine: frozen values, delivered on the event loop."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from loraplex_server.engine.errors import EngineError


class FinishReason(Enum):
    STOP = "stop"  # an end token or a stop token id
    LENGTH = "length"  # max_tokens or the end of the context
    CANCELLED = "cancelled"  # the client left, or the front found a stop string
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
    rank: int | None = None  # of a prompt's token: 1 is the most likely


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request. Exactly one event per request has ``finish`` set, the last."""

    request_id: str
    token_ids: tuple[int, ...]  # usually one; without the end token
    logprobs: tuple[
        TokenLogprobs, ...
    ] = ()  # one per token, then the stop token's; empty unless asked for
    finish: FinishReason | None = None
    stop_token: int | None = None  # the token that ended the answer
    error: EngineError | None = None  # with FinishReason.ERROR
    n_cached: int = 0  # prompt tokens taken from the prefix cache
    queue_s: float = 0.0  # seconds from submit to first admission, on the first event
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # on the first event when asked for
    n_drafted: int = 0  # drafts of the answer that steps have verified so far
    n_accepted: int = 0  # drafts that became its tokens
    pooled: Tensor | None = None  # of a request for vectors, see ``PooledRows.result``
