"""The default base with its demo adapters over three processes: it has nine heads."""

from pathlib import Path

import pytest

import loraplex_adapter_store
from tests.server.parallel.conftest import ask_all, check_same
from tests.server.parallel.test_parity import put_all
from tests.vectors.conftest import serving

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.nightly]

DEMOS = Path(loraplex_adapter_store.__file__).parent / "demos"
LIMITS = {"kv_memory_bytes": 64 << 20, "adapter_memory_bytes": 128 << 20, "max_model_len": 256}


async def test_demo_adapters_answer_the_same(pulled_base: Path, tmp_path: Path) -> None:
    folders = {path.name: path for path in DEMOS.iterdir() if path.is_dir()}
    assert len(folders) >= 8
    names: list[str | None] = [*sorted(folders), None]
    answers = []
    for size in (1, 3):
        state = tmp_path / str(size)
        async with serving(pulled_base, state, tensor_parallel_size=size, **LIMITS) as server:
            assert await put_all(server, folders) == {}
            prompt = "A pirate sells seven red apples at 9 pm to mary@example.com."
            answers.append(await ask_all(server, names, prompt=prompt, max_tokens=8))
    for name, found, expected in zip(names, *answers, strict=True):
        check_same(found, expected, name)
