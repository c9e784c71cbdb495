"""How often the demo adapter tool-calls makes the very calls that are wanted, on unseen tools.

    loraplex serve --port 8000
    python research/demos/eval_tool_calls.py --url http://127.0.0.1:8000 [-n 400] [--wrong]

Every prompt is held out from training: tools, names and values. Asked by OpenAI's client, greedy;
right is an answer whose calls, names and all arguments are the expected ones, in order. Categories
are those of the Berkeley Function Calling Leaderboard. Intervals are Wilson's, 95 %.
"""

import argparse
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from openai import OpenAI

from research.demos import DEMOS, Pair, held_out_pairs
from research.demos.tool_calls import called

_FORCED = "loraplex_forced_tokens_total"
_NO_CALL = ("irrelevance", "result")


@dataclass(frozen=True, slots=True)
class Mode:
    name: str
    strict: bool
    choice: str  # tool_choice


MODES = (
    Mode("strict, auto", strict=True, choice="auto"),
    Mode("strict, required", strict=True, choice="required"),
    Mode("not strict, auto", strict=False, choice="auto"),
)


class Share(NamedTuple):
    right: int
    n: int

    def __str__(self) -> str:
        low, high = wilson(self.right, self.n)
        return f"{self.right} of {self.n} ({self.right / self.n:.1%}, {low:.0%} to {high:.0%})"


class Asked(NamedTuple):
    pair: Pair
    given: object  # the calls, or the text where a sentence is expected
    n_tokens: int  # of the answer

    @property
    def is_right(self) -> bool:
        expected = called(self.pair.answer)
        return self.given == (self.pair.answer if expected is None else expected)


def category(pair: Pair) -> str:
    calls = called(pair.answer)
    if calls is None:
        return "result"  # a sentence about what a tool has answered
    if len(calls) != 1:
        return "parallel" if calls else "irrelevance"
    return "simple" if len(pair.tools) == 1 else "multiple"


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(client: OpenAI, mode: Mode, pairs: Sequence[Pair], model: str) -> list[Asked]:
    """Pairs that want no call are left out where one is required."""
    if mode.choice == "required":
        pairs = [pair for pair in pairs if category(pair) not in _NO_CALL]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: _ask(client, mode, pair, model), pairs))


def _ask(client: OpenAI, mode: Mode, pair: Pair, model: str) -> Asked:
    messages, tools = _messages(pair), [_tool(tool, mode) for tool in pair.tools]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=tools,
        tool_choice=mode.choice,  # type: ignore[call-overload]
        temperature=0,
        max_tokens=160,
    )
    message = answer.choices[0].message
    given: object = [
        {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        for call in message.tool_calls or []
    ]
    if called(pair.answer) is None and not message.tool_calls:
        given = message.content
    return Asked(pair, given, answer.usage.completion_tokens)


def _arguments(text: str) -> object:
    """What a call is made with; the text where it is no JSON, which nothing keeps tools to."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _messages(pair: Pair) -> list[Any]:
    """The chat, an earlier call as the client has to send it back."""
    messages: list[Any] = [{"role": "user", "content": pair.prompt}]
    for turn in pair.turns:
        if turn["role"] == "assistant":
            calls = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"]),
                    },
                }
                for i, call in enumerate(called(turn["content"]) or [])
            ]
            messages.append({"role": "assistant", "tool_calls": calls})
        else:
            messages.append({**turn, "tool_call_id": "call_0"})
    return messages


def _tool(tool: Any, mode: Mode) -> Any:
    shown = json.loads(json.dumps(tool))
    if mode.strict:
        shown["function"]["strict"] = True
        shown["function"]["parameters"]["additionalProperties"] = False
    return shown


def _forced_tokens(url: str) -> float:
    with urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(_FORCED))


def _show(mode: Mode, asked: Sequence[Asked], forced: float, n_headline: int) -> dict[str, Share]:
    rows = {"all calls": [one for one in asked if category(one.pair) not in _NO_CALL]}
    for one in asked:
        rows.setdefault(category(one.pair), []).append(one)
    rows[f"the first {n_headline} calls"] = rows["all calls"][:n_headline]
    shares = {name: Share(sum(a.is_right for a in row), len(row)) for name, row in rows.items()}
    n_tokens = sum(one.n_tokens for one in asked)
    print(f"\n{mode.name}; {forced / n_tokens:.0%} of {n_tokens} tokens forced")
    for name, share in sorted(shares.items()):
        print(f"  {name:20} {share}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tool-calls")
    parser.add_argument("-n", type=int, default=400, help="held-out chats")
    parser.add_argument("--headline", type=int, default=70, help="calls of the short draw")
    parser.add_argument("--modes", default="0,1,2", help="which of the modes")
    parser.add_argument("--wrong", action="store_true", help="print what went wrong")
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    options = parser.parse_args()
    pairs = held_out_pairs(DEMOS["tool-calls"], options.n)
    client = OpenAI(base_url=f"{options.url}/v1", api_key="none", timeout=600)
    counts = {}
    for mode in (MODES[int(i)] for i in options.modes.split(",")):
        before = _forced_tokens(options.url)
        asked = evaluate(client, mode, pairs, options.model)
        forced = _forced_tokens(options.url) - before
        counts[mode.name] = _show(mode, asked, forced, options.headline)
        for one in asked:
            if options.wrong and not one.is_right:
                names = [tool["function"]["name"] for tool in one.pair.tools]  # type: ignore[index]
                print(f"  {category(one.pair)} {one.pair.prompt!r} {names}")
                print(f"    wanted {called(one.pair.answer) or one.pair.answer}")
                print(f"    given  {one.given}")
    if options.out is not None:
        options.out.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
