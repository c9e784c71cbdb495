"""One state directory under two bases of the same shapes: adapters are those of the one served."""

import asyncio
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel

from tests.conformance.base_rows import BaseRow
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Question, ask_all, put_upload
from tests.conformance.oracle import load_base, make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_QUESTION = Question((5, 9, 33, 7, 2, 60, 5, 118), "x", echo=True)


def test_an_adapter_that_is_added_again_for_another_base_has_that_bases_scales(
    tmp_path: Path,
) -> None:
    row = BaseRow("llama", "llama")
    first, second = (save_base(row, tmp_path / f"base{seed}", seed=seed) for seed in (0, 1))
    config = LoraConfig(r=4, use_dora=True, target_modules=list(row.targets))
    dora, state = tmp_path / "dora", tmp_path / "state"
    make_peft(PeftRow("dora", lambda: config, moved(0.1)), load_base(first), dora)

    assert asyncio.run(_ask(first, state, dora)).status == 200
    refused = asyncio.run(_ask(second, state))
    assert (refused.status, "add it again" in refused.error) == (400, True)
    answer = asyncio.run(_ask(second, state, dora))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter names the base that it was trained on
        oracle = PeftModel.from_pretrained(load_base(second), dora).eval()
    assert explain(oracle, load_base(second), [_QUESTION], [answer]) is None


async def _ask(base: Path, state: Path, upload: Path | None = None) -> Answer:
    async with serving(base, state) as client:
        if upload is not None:
            put = await put_upload(client, "x", upload)
            assert put.status in (200, 201), put.message
        (answer,) = await ask_all(client, [_QUESTION])
        return answer
