"""The size of a JSON text is measured without parsing it, and equals that of the parsed value."""

import json
import random
from typing import Any

import pytest

from loraplex_adapter_store.files import json_size as module
from loraplex_adapter_store.files.json_size import JsonSize, check_depth, json_size


def value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6) if depth else rng.randrange(3)
    if kind < 3:
        return rng.choice(["", "[{\\", '"', '\\"', "]}", ",:", "\\\\", "ü[", 1, -0.5, None, True])
    if kind < 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {f'{n}\\"[': value(rng, depth - 1) for n in range(rng.randrange(4))}


def size_of(parsed: Any) -> JsonSize:
    """Count separators, objects and nesting in the parsed value."""
    if not isinstance(parsed, list | dict):
        return JsonSize(0, 0, 0)
    is_object = isinstance(parsed, dict)
    parts = [size_of(part) for part in (parsed.values() if is_object else parsed)]
    own = len(parts) * (1 + is_object) - bool(parts)
    return JsonSize(
        own + sum(part.n_values for part in parts),
        is_object + sum(part.n_objects for part in parts),
        1 + max((part.depth for part in parts), default=0),
    )


@pytest.mark.parametrize("piece", [2, 3, 7, 1 << 18])  # bytes that are read at once
def test_the_size_is_that_of_the_parsed_value(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    rng = random.Random(piece)
    for _ in range(300):
        made = [value(rng, rng.randrange(7))]
        text = json.dumps(made, ensure_ascii=rng.random() < 0.5).encode()
        *_, size = json_size(text)
        assert size == size_of(made), text


def test_the_depth_has_a_limit() -> None:
    check_depth("[" * 100 + "]" * 100)
    check_depth('"' + "[" * 1000 + '"')
    check_depth("[{}," * 50 + "]" * 2000)  # malformed, which the parser says
    for text in ("[" * 101, '{"a":' * 101, '["]",' * 101, "[" * 100_000):
        with pytest.raises(ValueError, match="deeper than the limit of 100"):
            check_depth(text)
