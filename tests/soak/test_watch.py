"""The soak's own judgement: it sees what it is there to see."""

import asyncio
import copy
import random
import time
from pathlib import Path

import httpx
import peft
import pytest
import torch

from tests.soak.chaos import _BEGAN, Chaos, Sending
from tests.soak.ledger import GONE, Ledger
from tests.soak.marked import save_marked_base, write_contents
from tests.soak.watch import Life


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _life(mib_per_minute: float, files: int) -> Life:
    life = Life(1)
    life.samples = [(s, 500 + s / 60 * mib_per_minute, 90 + s * files // 600) for s in range(600)]
    return life


def test_memory_that_grows_and_files_that_stay_open_are_problems() -> None:
    assert _life(0.5, 0).problems() == []
    assert "memory grows by 9.0 MiB a minute" in _life(9.0, 0).problems()
    peaks = _life(0.5, 0)
    peaks.samples = [(s, mib + 150 * (s > 400 and s % 5 < 2), n) for s, mib, n in peaks.samples]
    assert peaks.problems() == []
    assert any("open files" in text for text in _life(0.0, 200).problems())


def test_a_lost_change_and_one_that_nobody_acknowledged_are_told_apart() -> None:
    ledger = Ledger(["a", "b"])
    for name in ("a", "b"):
        ledger.begin(name, 10)
        ledger.acknowledge(name)
    ledger.begin("b", 11)
    ledger.lose_touch("b")
    assert not ledger.find("a", GONE), "it was acknowledged and is gone"
    assert ledger.find("b", 11), "it was asked for"


def test_a_request_may_see_what_was_true_while_it_ran() -> None:
    ledger = Ledger(["a"])
    ledger.begin("a", 10)
    ledger.acknowledge("a")
    since = time.monotonic()
    ledger.begin("a", 11)
    assert ledger.possible("a", since) == {10, 11}
    ledger.acknowledge("a")
    assert ledger.possible("a", since) == {10, 11}
    assert ledger.possible("a", time.monotonic() + 1) == {11}


@torch.no_grad()
def test_by_peft_each_content_answers_every_prompt_with_its_mark(tmp_path: Path) -> None:
    model = save_marked_base(tmp_path / "base")
    contents = write_contents(model, tmp_path / "contents", 40)
    assert len({content.mark for content in contents}) == 40
    prompts = torch.randint(3, 300, (16, 12), generator=torch.Generator().manual_seed(1))
    for index, content in list(enumerate(contents))[::8]:
        folder = tmp_path / "contents" / str(index)
        (folder / "adapter_config.json").write_bytes(content.config)
        tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        assert (tuned(input_ids=prompts).logits.argmax(-1) == content.mark).all()


@pytest.mark.anyio
async def test_a_wrong_mark_or_a_missing_adapter_is_a_violation() -> None:
    chaos = Chaos([], ["a"], seed=0)
    chaos.ledger.begin("a", 10)
    chaos.ledger.acknowledge("a")
    since = time.monotonic()
    chaos._check_mark([10] * 8, "a", since)
    assert chaos.violations == []
    chaos._check_mark([11] * 8, "a", since)
    chaos._check_mark([10] * 7 + [11], "a", since)
    chaos._is_answered(httpx.Response(404, json={}), "a", since)
    assert len(chaos.violations) == 3
    chaos.is_away = False
    _BEGAN.set(time.monotonic())
    gone = httpx.Response(503, json={"error": {}}, headers={"retry-after": "5"})
    chaos._is_fine(gone, "while it runs")
    chaos.is_away = True
    chaos._is_fine(gone, "while it is away")
    assert [text.partition(":")[0] for text in chaos.violations[3:]] == ["while it runs"]
    await chaos._client.aclose()


@pytest.mark.anyio
async def test_a_server_that_hangs_up_is_excused_only_if_it_went_away_or_waited_too_long() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    chaos = Chaos([], ["a"], seed=0)
    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        chaos.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        chaos.is_away, _ = False, _BEGAN.set(time.monotonic())
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await chaos.ask(random.Random(1))
    chaos._broken("ask", caught.value)
    assert "sent within 0." in chaos.violations[0]
    chaos.left_at = time.monotonic()
    chaos._broken("ask", caught.value)
    _BEGAN.set(time.monotonic() + 1)
    slow = Sending()
    slow._began = time.monotonic() - 11
    caught.value.request.extensions["sending"] = slow
    chaos._broken("ask", caught.value)
    assert len(chaos.violations) == 1
    assert chaos.counts["sent too slowly"] == 1
    await chaos._client.aclose()
