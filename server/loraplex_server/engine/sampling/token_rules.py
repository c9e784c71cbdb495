"""The tokens that a request's own fields allow, and the errors of requests without any."""

from typing import NamedTuple

from loraplex_server.engine.errors import AdapterUnservable, GrammarTooComplex, NoTokenAllowed
from loraplex_server.engine.requests.request import Constraint, Request


def is_plainly_greedy(request: Request) -> bool:
    """Return True if the next token is the argmax of unchanged logits, without logprobs."""
    params = request.source.sampling
    return params.greedy and params.logprobs is None and not is_adjusted(request)


def forced_token(request: Request, token_id: int) -> int:
    """Return the token that the request's grammar forces, or ``token_id`` if it forces none."""
    forced = None if request.constraint is None else request.constraint.forced
    return token_id if forced is None else forced


def no_token() -> AdapterUnservable:
    """Return the error of a row whose logits give no token a probability."""
    return AdapterUnservable(
        "the adapter's weights are so large that no token has a probability: its logits "
        "are infinite or no numbers; check its scale (alpha / r)"
    )


def dead_end(constraint: Constraint) -> GrammarTooComplex:
    """Return the error of a row whose grammar allows no token."""
    return GrammarTooComplex(
        f"the grammar allows no token here ({constraint.error or 'a dead end'}); simplify it"
    )


def forbidden_by_bad_words() -> NoTokenAllowed:
    return NoTokenAllowed(
        "bad_words forbid every token that the answer's grammar allows here; leave out words that "
        "the schema needs",
        "bad_words",
    )


def is_adjusted(request: Request) -> bool:
    """Return True if biases, penalties or forbidden tokens may change the request's logits."""
    params = request.source.sampling
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words
        or params.allowed_token_ids is not None
        or request.n_output < params.min_tokens
    )


class TokenRules(NamedTuple):
    """The tokens that a request's own fields allow, apart from its grammar."""

    allowed: frozenset[int] | None  # from ``allowed_token_ids``; None allows all but ``forbidden``
    forbidden: set[int]  # by bad_words and min_tokens; empty if ``allowed`` is set
    banned: set[int]  # by bad_words


def token_rules(request: Request, eos_token_ids: frozenset[int], vocab_size: int) -> TokenRules:
    """Return the request's rules. Raises NoTokenAllowed if bad_words forbid every token.

    min_tokens yields if it would forbid the last token.
    """
    params = request.source.sampling
    banned = _ends_of_bad_words(request)
    ends = eos_token_ids | params.stop_token_ids if request.n_output < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        allowed = params.allowed_token_ids - banned
        if not allowed:
            raise NoTokenAllowed(
                "bad_words forbid every one of allowed_token_ids here; allow other tokens",
                "bad_words",
            )
        return TokenRules(allowed - ends or allowed, set(), banned)
    if len(banned) >= vocab_size:
        raise NoTokenAllowed("bad_words forbid every token here; leave some out", "bad_words")
    every = banned | ends
    return TokenRules(None, every if len(every) < vocab_size else banned, banned)


def _ends_of_bad_words(request: Request) -> set[int]:
    """Return the last tokens of bad words whose other tokens end the output."""
    words = request.source.sampling.bad_words
    if not words:
        return set()
    output = tuple(request.output_ids[-max(map(len, words)) :])
    return {word[-1] for word in words if output[len(output) - len(word) + 1 :] == word[:-1]}
