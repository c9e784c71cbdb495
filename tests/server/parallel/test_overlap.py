"""Steps of two processes that are started while the one before runs: the same answers over HTTP.

Adapters come, share steps and leave meanwhile: what ranks are told stands in order with the steps.
"""

import asyncio
from pathlib import Path

import pytest

from tests.server.parallel.conftest import LIMITS, PROMPT, Answer, Pair, ask, check_same
from tests.server.parallel.test_parity import put_all
from tests.support.overlapping import overlapping
from tests.vectors.conftest import Server, serving

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::Warning")]

NAMES = ["lora", "mixlora", "ia3", "sora", "vera", "fourierft"]
FEW_PLACES = LIMITS | {"max_loras": 7}  # for five plain adapters and one with four experts


@pytest.mark.slow
async def test_overlapping_steps_answer_the_same(
    pair: Pair, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {name: folders[name] for name in NAMES}
    asked = [
        (name, [*PROMPT, 7 + turn] * (1 + 2 * turn), 9 + 3 * turn)
        for turn in range(2)
        for name in (*NAMES, None)
    ]

    async def all_of(server: Server) -> list[Answer]:
        assert await put_all(server, chosen) == {}
        return await asyncio.gather(
            *(ask(server, name, prompt=prompt, max_tokens=n) for name, prompt, n in asked)
        )

    expected = await all_of(pair.alone)
    with overlapping() as watched:
        async with serving(base, tmp_path, tensor_parallel_size=2, **FEW_PLACES) as split:
            found = await all_of(split)
            assert split.engine.loop.adapters.n_evictions > 0
    for one, other, wish in zip(found, expected, asked, strict=True):
        check_same(one, other, wish)
    assert watched.n_overlapped > watched.n_started // 2
