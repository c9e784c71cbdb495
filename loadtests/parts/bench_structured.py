"""Times rows with a JSON schema beside rows without, with and without jump-forward.

    python loadtests/parts/bench_structured.py            # or --quick: does it run?

The default base in this process, no HTTP and no prefix cache. In each round the three cases take
turns with the same prompts, seed and temperature; a free row gets as many tokens as the
constrained one had, so that the rows of a batch end in the same order.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from loraplex_server.api.serving.text_generation.structured_output import json_grammar
from loraplex_server.engine.build import BuiltEngine, build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.model.loading.pull import DEFAULT_BASE, resolve_model

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"$ref": "#/$defs/text"},
        "occupation": {"$ref": "#/$defs/text"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "address": {
            "type": "object",
            "properties": {"street": {"$ref": "#/$defs/text"}, "city": {"$ref": "#/$defs/text"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "languages": {"type": "array", "items": {"$ref": "#/$defs/text"}, "maxItems": 4},
    },
    "required": ["name", "occupation", "age", "address", "languages"],
    "additionalProperties": False,
    "$defs": {"text": {"type": "string", "maxLength": 32}},
}
_PROMPT = "Describe a person as JSON, number {}:\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="2 rows, 1 round, 48 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.max_tokens = 2, 1, 48
    path = resolve_model(None)
    engines = {
        forced: build_engine(
            EngineConfig(jump_forward=forced, self_check=False, prefix_cache=False), path
        )
        for forced in (True, False)
    }
    try:
        _compare(engines, arguments)
    finally:
        for built in engines.values():
            built.engine.close()


def _compare(engines: dict[bool, BuiltEngine], arguments: argparse.Namespace) -> None:
    built = engines[True]
    backend = built.tokenizer.backend_tokenizer
    trie = TokenTrie(backend.to_str(), built.base_spec.vocab_size, built.engine.eos_token_ids)
    grammar = trie.compile(GrammarSpec(json_grammar(_SCHEMA)))
    prompts = [backend.encode(_PROMPT.format(row)).ids for row in range(arguments.rows)]
    most = [arguments.max_tokens] * arguments.rows
    rates: dict[str, list[float]] = {"with forced tokens": [], "without forced": [], "free": []}
    n_forced = n_tokens = 0
    for number in range(arguments.rounds + 1):  # the first warms up
        sampling = SamplingParams(0, seed=number, temperature=arguments.temperature)
        before = built.engine.stats().n_jump_forward_tokens
        lengths, forced_rate = _time(engines[True], prompts, grammar, most, sampling)
        forced = built.engine.stats().n_jump_forward_tokens - before
        plain_lengths, plain_rate = _time(engines[False], prompts, grammar, most, sampling)
        free_lengths, free_rate = _time(engines[True], prompts, None, lengths, sampling)
        if not lengths == plain_lengths == free_lengths:
            raise SystemExit(f"answers differ: {lengths}, {plain_lengths}, {free_lengths} tokens")
        if number:
            n_forced, n_tokens = n_forced + forced, n_tokens + sum(lengths)
            for name, rate in zip(rates, (forced_rate, plain_rate, free_rate), strict=True):
                rates[name].append(rate)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"{name:20} {rate:8.0f} tok/s   {rate / medians['free']:.2f} of free rows")
    print(f"forced tokens: {n_forced / n_tokens:.0%} of {n_tokens} in constrained answers")
    told = {**vars(arguments), "base": DEFAULT_BASE, "forced": n_forced / n_tokens}
    print(json.dumps({**told, "tok/s": rates}))


def _time(
    built: BuiltEngine,
    prompts: Sequence[Sequence[int]],
    grammar: CompiledGrammar | None,
    lengths: Sequence[int],
    sampling: SamplingParams,
) -> tuple[list[int], float]:
    """Return the tokens of each answer, and all tokens a second."""

    async def one(row: int) -> int:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        params = replace(sampling, max_tokens=lengths[row], ignore_eos=grammar is None)
        built.engine.submit(
            GenerationRequest(f"{row}", tuple(prompts[row]), params, grammar=grammar),
            events.put_nowait,
        )
        n_tokens = 0
        while True:
            event = await events.get()
            n_tokens += len(event.token_ids)
            if event.finish is not None:
                return n_tokens

    async def run() -> list[int]:
        return await asyncio.gather(*map(one, range(len(prompts))))

    started = time.perf_counter()
    found = asyncio.run(run())
    return found, sum(found) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
