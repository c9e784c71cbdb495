"""Times lone requests with drafts and without: texts that repeat, and texts that do not.

    python loadtests/parts/bench_drafts.py            # or --quick: does it run?

The default base in this process, no HTTP and no prefix cache. For each text the two cases take
turns, several rounds; the medians of tokens per second after the first token, and of CPU
milliseconds a token. The answers must be the same. ``--rows`` asks several at once.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex_server.api.serving.text_generation.structured_output import json_grammar
from loraplex_server.engine.build import BuiltEngine, build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.model.loading.pull import DEFAULT_BASE, resolve_model

_CODE = """def total(prices, rate):
    subtotal = 0
    for price in prices:
        subtotal += price
    tax = subtotal * rate
    return subtotal + tax


def average(prices):
    if not prices:
        return 0
    return sum(prices) / len(prices)


def cheapest(prices):
    best = None
    for price in prices:
        if best is None or price < best:
            best = price
    return best
"""
_NEWS = (
    "The city of Lisbon lies on the western coast of Portugal, where the river Tagus meets the "
    "Atlantic Ocean. Its oldest quarter, Alfama, survived the earthquake of 1755, and its narrow "
    "lanes still climb from the water to the castle of Saint George. Ferries cross the river every "
    "ten minutes, and the yellow trams of line 28 pass most of the sights."
)
_PEOPLE = "Anna, 31, Berlin\nBob, 25, Paris\nCarla, 44, Rome\nDavid, 19, Madrid\nEve, 52, Vienna\n"
_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"type": "string", "maxLength": 24},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    },
    "minItems": 5,
    "maxItems": 5,
}
_PROMPTS = {
    "edit": f"Write this Python code again with a comment before each function:\n{_CODE}",
    "quote": f"Repeat the following text word for word:\n{_NEWS}",
    "extract": f"List every sentence of this text that names a place:\n{_NEWS}",
    "JSON": f"Convert to a JSON list of objects with name, age and city:\n{_PEOPLE}",
    "schema": f"Convert to a JSON list of objects with name, age and city:\n{_PEOPLE}",
    "story": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "explain": "Explain why the sky is blue and why sunsets are red.",
    "poem": "Write a poem about autumn in a small village by the sea.",
}


@dataclass(frozen=True)
class Run:
    token_ids: list[list[int]]
    n_accepted: int
    n_drafted: int
    seconds: float  # after the first tokens, like the next field
    cpu_s: float

    @property
    def n_tokens(self) -> int:
        return sum(len(ids) - 1 for ids in self.token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--only", nargs="*", choices=_PROMPTS, default=list(_PROMPTS))
    parser.add_argument("--quick", action="store_true", help="1 round, 24 tokens, two texts")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.max_tokens, arguments.only = 1, 24, ["quote", "story"]
    config = EngineConfig(prefix_cache=False, threads=arguments.threads)
    built = build_engine(config, resolve_model(None), model_id=DEFAULT_BASE)
    grammar = _grammar(built)
    try:
        for name in arguments.only:
            prompt = _encoded(built, _PROMPTS[name])
            runs: dict[bool, list[Run]] = {True: [], False: []}
            for _ in range(arguments.rounds):
                for drafts, found in runs.items():
                    asked = _requests(
                        arguments, prompt, grammar if name == "schema" else None, drafts=drafts
                    )
                    found.append(asyncio.run(_run(built, asked)))
            print(json.dumps(_result(name, runs)), flush=True)
    finally:
        built.engine.close()


def _grammar(built: BuiltEngine) -> CompiledGrammar:
    tokenizer = built.tokenizer
    trie = TokenTrie(
        tokenizer.backend_tokenizer.to_str(), len(tokenizer), built.engine.eos_token_ids
    )
    return trie.compile(GrammarSpec(json_grammar(_SCHEMA)))


def _encoded(built: BuiltEngine, text: str) -> tuple[int, ...]:
    ids = built.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return tuple(ids)


def _requests(
    arguments: argparse.Namespace,
    prompt: tuple[int, ...],
    grammar: CompiledGrammar | None,
    *,
    drafts: bool,
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"row-{row}",
            prompt,
            SamplingParams(arguments.max_tokens, temperature=arguments.temperature, seed=row),
            grammar=grammar,
            drafts=drafts,
        )
        for row in range(arguments.rows)
    ]


async def _run(built: BuiltEngine, requests: Sequence[GenerationRequest]) -> Run:
    events: asyncio.Queue[TokenEvent] = asyncio.Queue()
    for request in requests:
        built.engine.submit(request, events.put_nowait)
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last: dict[str, TokenEvent] = {}
    began, cpu_began = 0.0, 0.0
    while len(last) < len(requests):
        event = await events.get()
        ids[event.request_id] += event.token_ids
        if event.finish is not None:
            last[event.request_id] = event
        if not began and all(ids.values()):
            began, cpu_began = time.perf_counter(), time.process_time()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    n_accepted = sum(event.n_accepted for event in last.values())
    n_drafted = sum(event.n_drafted for event in last.values())
    return Run(list(ids.values()), n_accepted, n_drafted, seconds, cpu_s)


def _result(name: str, runs: Mapping[bool, Sequence[Run]]) -> dict[str, object]:
    answers = {str(run.token_ids) for found in runs.values() for run in found}
    if len(answers) != 1:
        raise SystemExit(f"{name}: drafts changed an answer")
    rate = {on: statistics.median(r.n_tokens / r.seconds for r in runs[on]) for on in runs}
    cpu_ms = {on: statistics.median(1000 * r.cpu_s / r.n_tokens for r in runs[on]) for on in runs}
    last = runs[True][-1]
    return {
        "text": name,
        "tokens": last.n_tokens,
        "tokens_per_s": {"drafts": round(rate[True], 1), "none": round(rate[False], 1)},
        "cpu_ms_per_token": {"drafts": round(cpu_ms[True], 2), "none": round(cpu_ms[False], 2)},
        "speed": round(rate[True] / rate[False], 2),
        "cpu": round(cpu_ms[False] / cpu_ms[True], 2),
        "drafted": last.n_drafted,
        "accepted": last.n_accepted,
    }


if __name__ == "__main__":
    main()
