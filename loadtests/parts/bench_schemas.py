"""Counts the schemas of JSONSchemaBench that the server enforces, and judges what they allow.

    git clone https://github.com/guidance-ai/jsonschemabench
    python loadtests/parts/bench_schemas.py jsonschemabench/maskbench/data

Takes 411 schemas of 15 sources, evenly spaced by file name. The package jsonschema judges random
texts of each grammar, and the bench's own instances: a grammar must accept no invalid one.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from loraplex_server.api.serving.text_generation.structured_output import json_grammar

# Source → schemas of it.
_SOURCES = {
    **dict.fromkeys(
        ("Github_trivial", "Github_easy", "Github_medium", "Github_hard", "Github_ultra"), 37
    ),
    "JsonSchemaStore": 50,
    "Handwritten": 42,
    "Synthesized": 43,
    "Kubernetes": 13,
    "Glaiveai2K": 13,
    "BFCL": 13,
    "JME": 12,
    "MCPspec": 13,
    "Snowplow": 13,
    "WashingtonPost": 14,
}
_MAX_BYTES = 4000  # of a random text
_ENDS = b'"}]'  # likelier than other bytes, so that a text ends


class Outcome(NamedTuple):
    """This is what became of one schema."""

    refusal: str  # "" if the schema is enforced
    n_texts: int  # complete random texts
    n_invalid: int  # of them, and of the bench's instances that the grammar accepts
    n_instances: int  # valid instances of the bench
    n_refused: int  # of them, by the grammar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="Folder of the bench's JSON files.")
    parser.add_argument("--texts", type=int, default=8, help="Random texts for each schema.")
    arguments = parser.parse_args()
    refusals, totals, by_source = Counter[str](), Counter[str](), Counter[str]()
    for source, path in _chosen(arguments.data):
        case = json.loads(path.read_text(encoding="utf-8"))
        outcome = judged(case, arguments.texts)
        totals.update(schemas=1, refused=bool(outcome.refusal), texts=outcome.n_texts)
        totals.update(invalid=outcome.n_invalid, instances=outcome.n_instances)
        totals.update(instances_refused=outcome.n_refused)
        if outcome.refusal:
            refusals[re.sub(r"[\d\"'`].*", "", outcome.refusal)[:60]] += 1
            by_source[source] += 1
        if outcome.n_invalid or outcome.refusal:
            print(f"{path.stem}: {outcome.refusal or f'{outcome.n_invalid} invalid'}", flush=True)
    print(*(f"{n:4} refused of {source}" for source, n in by_source.most_common()), sep="\n")
    print(*(f"{n:4} {reason}" for reason, n in refusals.most_common()), sep="\n")
    print(json.dumps(totals))


def _chosen(data: Path) -> Iterator[tuple[str, Path]]:
    for source, n in _SOURCES.items():
        paths = sorted(data.glob(f"{source}*.json"))
        for i in range(n):
            yield source, paths[i * len(paths) // n]


def judged(case: dict[str, Any], n_texts: int) -> Outcome:
    schema = case["schema"]
    tokenizer = LLTokenizer("byte")
    try:
        matcher = LLMatcher(tokenizer, json_grammar(schema), log_level=0)
    except ValueError as error:
        return Outcome(str(error), 0, 0, 0, 0)
    if matcher.is_error():
        return Outcome(matcher.get_error().split("\n")[0], 0, 0, 0, 0)
    judge = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    texts = [_random_text(matcher.deep_copy(), tokenizer, seed) for seed in range(n_texts)]
    complete = [json.loads(text) for text in texts if text is not None]
    accepted = {
        valid: [_accepts(matcher.deep_copy(), test["data"]) for test in tests]
        for valid, tests in _instances(case["tests"], judge).items()
    }
    n_invalid = sum(not judge.is_valid(value) for value in complete) + sum(accepted[False])
    n_refused = accepted[True].count(False)
    return Outcome("", len(complete), n_invalid, len(accepted[True]), n_refused)


def _instances(
    tests: Sequence[dict[str, Any]], judge: jsonschema.protocols.Validator
) -> dict[bool, list[dict[str, Any]]]:
    return {
        valid: [test for test in tests if judge.is_valid(test["data"]) is valid]
        for valid in (True, False)
    }


def _accepts(matcher: LLMatcher, value: object) -> bool:
    text = json.dumps(value, ensure_ascii=False).encode()
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


def _random_text(matcher: LLMatcher, tokenizer: LLTokenizer, seed: int) -> str | None:
    """Return a random text of the grammar, or None for one that found no end."""
    chance = random.Random(seed)
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    text = bytearray()
    while len(text) < _MAX_BYTES and not matcher.is_error():
        if matcher.is_accepting() and (matcher.is_stopped() or chance.random() < 0.5):
            return text.decode()
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:256])
        if not allowed.size:
            return None
        ends = [byte for byte in allowed if byte in _ENDS]
        byte = int(chance.choice(ends if ends and chance.random() < 0.5 else list(allowed)))
        matcher.consume_token(byte)
        text.append(byte)
    return None


if __name__ == "__main__":
    main()
