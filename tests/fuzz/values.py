"""Values that programs trip over, and changes of JSON that keep most of its form."""

import copy
import json
import random
from typing import Any

NAMES = (
    *("kept", "kept", "kept", "other", "org/one", "generated/x", "auto", "base", "kept@", "pin"),
    *("kept@0000", "../../etc/passwd", "..%2f..%2fetc", "/etc/passwd", "a//b", ".", "a\0b", ""),
    *("ü", "名前", "a" * 129, "a" * 5000, "x\ny", "%", "kept/pin", "kept?x=1", "KEPT", "‮txet"),
)
STRINGS = (
    *("kept", "base", "user", "system", "assistant", "text", "hello", "hi there", "auto", ""),
    *("../../etc/passwd", "/proc/self/environ", "file:///etc/passwd", "hf://a/b", "s3://b/k"),
    *("http://127.0.0.1:1/x", "https://[::1", "gs://", "\0", "\ud800", "\U0001f600", "e\u0301"),
    *("a" * 300, "ab " * 4000, "{{ 7*7 }}", "{% for x in y %}", "%s%n", "(a+)+$", "null", "1e999"),
    *("[DONE]", "data: x\n\n", "<|endoftext|>", "\r\nX: y", "🏳️‍🌈", "\ufeff", "NaN", "true", "-0"),
)
NUMBERS = (
    *(0, 1, 2, 3, 5, 8, -1, -2, 0.0, -0.0, 0.5, 1.5, 1e-320, 5e-324, 1e308, -1e308, 1 << 31),
    *(
        (1 << 53) + 1,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) + 1,
        -(1 << 63),
        10**30,
        4096,
        65536,
        299,
        300,
    ),
)
FIELDS = (
    *("model", "adapter", "adapter_id", "messages", "prompt", "n", "stream", "max_tokens", "stop"),
    *("logprobs", "top_logprobs", "echo", "tools", "response_format", "guided_json", "name", "r"),
    *("description", "source", "digest", "weight", "arrow", "top_k", "temperature", "__class__"),
    *("role", "content", "type", "text", "seed", "logit_bias", "suffix", "best_of", "unknown", ""),
)
MAX_DEPTH = 600
DEPTHS = (50, 99, 101, 130, 255, 300)  # json.dumps itself fails at a thousand


def odd_value(rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(STRINGS)
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind == 6:
        return rng.choice((None, True, False, [], {}, [[]], [{}], {"": None}))
    if kind == 7:
        return [odd_value(rng) for _ in range(rng.randrange(1, 5))]
    return {rng.choice(FIELDS): odd_value(rng) for _ in range(rng.randrange(1, 4))}


def mutated(rng: random.Random, value: Any, n_changes: int) -> Any:
    """A copy of ``value`` with some places replaced, dropped, doubled or added."""
    root = [copy.deepcopy(value)]
    for _ in range(n_changes):
        holder, key = rng.choice(list(_places(root)))
        action = rng.randrange(8)
        inside = holder[key]
        if action < 4:
            holder[key] = odd_value(rng)
        elif action == 4 and holder is not root:
            del holder[key]
        elif action == 5 and isinstance(inside, dict):
            inside[rng.choice(FIELDS)] = odd_value(rng)
        elif action == 6 and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[0]) if inside else odd_value(rng))
        elif action == 7:
            holder[key] = [inside] if rng.random() < 0.5 else {rng.choice(FIELDS): inside}
    return root[0]


def deepened(rng: random.Random, value: Any) -> Any:
    """A copy of ``value`` with one place under many lists and objects."""
    root = [copy.deepcopy(value)]
    holder, key = rng.choice(list(_places(root)))
    for _ in range(rng.choice(DEPTHS)):
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    return root[0]


def to_bytes(value: Any) -> bytes:
    """JSON, lone surrogates and all."""
    return json.dumps(value).encode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were nearly right."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(rng.randrange(256) for _ in range(4)) + data[at + 4 :]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 9) :]
        case 3:
            return data[:at] + data[max(0, at - 20) : at] * rng.randrange(1, 50) + data[at:]
        case 4:
            return b"\xef\xbb\xbf" + data
        case 5:
            return data.replace(
                b"1", rng.choice((b"NaN", b"Infinity", b"1e999", b"01", b"1" * 400))
            )
        case 6:
            return b"[" * MAX_DEPTH + data + b"]" * rng.choice((0, MAX_DEPTH))
        case 7:
            return rng.choice(
                (b"", b"\0", b"null", b"[]", b'""', b"\xff\xfe{\0}\0", b"{", b"PK\3\4")
            )
        case _:
            return data + rng.choice((b"\0", b"}", data, b" " * 1000, b"\n//"))


def _places(value: Any) -> Any:
    """Every (container, key)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
