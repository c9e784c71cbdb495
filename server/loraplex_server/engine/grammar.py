"""What an answer may look like, as a grammar of llguidance.

GrammarSpec ── CompiledGrammar ── Constraint
(text)         (shared)           (one request's place in it, see ``constraint``)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

__all__ = ["CompiledGrammar", "GrammarRefused", "GrammarSpec", "TokenTrie"]

# A mask takes at most some 20 ms: a grammar that needs more ends its request with an error.
_STEP_ITEMS = 50_000
_STEP_LEXER_FUEL = 200_000
_LEXER_STATES = 20_000  # of 1 to 2 KB each, shared by all requests with the grammar


class GrammarRefused(Exception):
    """The grammar is wrong, uses what is not supported, or is too large. The message says which."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar that is not compiled yet.

    ``text`` is anything that llguidance reads: Lark (with ``%json``, as ``StructTag.to_grammar``
    writes it), or a JSON object ``{"grammars": [...]}`` as ``LLMatcher.grammar_from_*`` return.

    ``after``: the answer is free text up to and including this, then the grammar begins. It may be
    a special token's text (``</think>``). An end token is not allowed before the grammar ends, so
    an answer cannot get round it.

    ``may_be_gbnf``: ``text`` may also be llama.cpp's GBNF.
    """

    text: str
    after: str | None = None
    may_be_gbnf: bool = False

    def as_lark(self) -> GrammarSpec:
        """Without GBNF. Raises GrammarRefused. Takes seconds for thousands of rules."""
        if not self.may_be_gbnf:
            return self
        try:
            return GrammarSpec(any_to_lark(self.text), self.after)
        except Exception as error:  # the converter has a class of its own for each kind
            raise GrammarRefused(f"neither Lark nor GBNF: {_reason(str(error))}") from error


class TokenTrie:
    """The tokenizer as llguidance has it. Building takes some 0.4 s for 50,000 tokens."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """``tokenizer_json``: of the Rust tokenizer, or a path. ``vocab_size``: of the logits."""
        self.vocab_size = vocab_size
        self._special = _special_tokens(tokenizer_json)
        self.tokenizer = LLTokenizer(
            tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None
        )

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises GrammarRefused. Lets go of Python's lock.

        A hostile text may take minutes here, or end the process: see ``grammar_trial``.
        """
        matcher = self._matcher(spec)
        if matcher.is_error():
            raise GrammarRefused(_reason(matcher.get_error()))
        return CompiledGrammar(matcher, spec)

    def _matcher(self, spec: GrammarSpec) -> LLMatcher:
        limits = LLParserLimits(
            step_max_items=_STEP_ITEMS,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            max_lexer_states=_LEXER_STATES,
            verbose_errors=False,
        )
        return LLMatcher(self.tokenizer, self._whole(spec), log_level=0, limits=limits)

    def _whole(self, spec: GrammarSpec) -> str:
        """The grammar with the free text before it, if there is any."""
        if spec.after is None:
            return spec.text
        inner = _grammars(spec.text)
        token_id = self._special.get(spec.after)
        if token_id is None:
            free = f"free[lazy]: /(?s:.*)/ {json.dumps(spec.after, ensure_ascii=False)}"
        else:
            free = f"free: FREE <[{token_id}]>\nFREE: /(?s:.*)/"
        head = f"start: free @{inner[0]['name']}\n{free}"
        return json.dumps({"grammars": [{"name": "free_first", "lark_grammar": head}, *inner]})


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """At its beginning, and never moved: requests move copies. Copies cost microseconds."""

    matcher: LLMatcher
    spec: GrammarSpec  # what it was compiled of


def _special_tokens(tokenizer_json: str) -> dict[str, int]:
    text = tokenizer_json
    if not text.lstrip().startswith("{"):
        with open(tokenizer_json, encoding="utf-8") as file:
            text = file.read()
    added = json.loads(text).get("added_tokens") or []
    return {entry["content"]: entry["id"] for entry in added if entry.get("special")}


def _grammars(text: str) -> list[dict[str, object]]:
    if not text.lstrip().startswith("{"):
        return [{"name": "constrained", "lark_grammar": text}]
    grammars: list[dict[str, object]] = json.loads(text)["grammars"]
    return [{"name": "constrained", **grammars[0]}, *grammars[1:]]


def _reason(error: str) -> str:
    """The first line and what the parser of expressions says; the others show the grammar."""
    first, *others = error.strip().split("\n")
    told = [line.strip() for line in others if line.strip().startswith("error: ")]
    line = " ".join([first[:300], *told])
    keywords = line.removeprefix("Unimplemented keys: ")
    if keywords == line:
        return line
    return f"{keywords} cannot be enforced; leave it out, or send a json_schema with strict: false"
