"""Grammars of answers, for llguidance.

GrammarSpec ── CompiledGrammar ── Constraint
(text)         (shared)           (the state of one request, see ``constraint``)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

# With these limits a mask takes about 20 ms at most. A grammar that needs more fails its request.
_STEP_ITEMS = 50_000
_STEP_LEXER_FUEL = 200_000
_LEXER_STATES = 20_000  # of 1 to 2 KB each, shared by all requests with the grammar


class GrammarRefused(Exception):
    """The grammar is invalid, unsupported or too large. The message says which."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The text of a grammar.

    ``text`` is anything that llguidance reads: Lark (with ``%json``, as ``StructTag.to_grammar``
    writes it), or a JSON object ``{"grammars": [...]}`` as ``LLMatcher.grammar_from_*`` return.

    ``after``: the answer is free text up to and including this text, then the grammar begins. The
    text may be that of a special token (``</think>``). No end token is allowed before the grammar
    ends, so an answer cannot avoid the grammar.

    ``may_be_gbnf``: ``text`` may also be llama.cpp's GBNF.
    """

    text: str
    after: str | None = None
    may_be_gbnf: bool = False

    def as_lark(self) -> GrammarSpec:
        """Return the grammar as Lark. Raises GrammarRefused. Thousands of rules take seconds."""
        if not self.may_be_gbnf:
            return self
        try:
            return GrammarSpec(any_to_lark(self.text), self.after)
        except Exception as error:  # the converter has many error classes
            raise GrammarRefused(f"neither Lark nor GBNF: {_reason(str(error))}") from error


class TokenTrie:
    """The tokenizer in llguidance's form. Building it takes about 0.4 s for 50,000 tokens."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """``tokenizer_json``: the JSON text or its path. ``vocab_size``: width of the logits."""
        self.vocab_size = vocab_size
        self._special = _special_tokens(tokenizer_json)
        self.tokenizer = LLTokenizer(
            tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None
        )

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile ``spec``. Raises GrammarRefused. Releases the GIL.

        A hostile text may take minutes or end the process, so see ``grammar_trial`` first.
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
        """Return the grammar, with the free text before it if there is any."""
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
    """A compiled grammar at its beginning. Requests advance copies, which cost microseconds."""

    matcher: LLMatcher
    spec: GrammarSpec  # the source that was compiled


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
    """Return the first line and the regex parser's errors. Other lines only quote the grammar."""
    first, *others = error.strip().split("\n")
    details = [line.strip() for line in others if line.strip().startswith("error: ")]
    line = " ".join([first[:300], *details])
    keywords = line.removeprefix("Unimplemented keys: ")
    if keywords == line:
        return line
    return f"{keywords} cannot be enforced; leave it out, or send a json_schema with strict: false"
