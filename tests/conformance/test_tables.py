"""The tables of rows are complete, and the documentation calls exact what they cover, no more."""

import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest

from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.encoders.encoder_rows import ENCODER_ROWS
from tests.conformance.encoders.image_rows import IMAGE_ROWS
from tests.conformance.expert_rows import EXPERT_ROWS
from tests.conformance.head_rows import HEAD_ROWS
from tests.conformance.lora_rows import LORA_ROWS
from tests.conformance.mixture_rows import MIXTURE_ROWS
from tests.conformance.own_rows import OWN_ROWS
from tests.conformance.peft_rows import PEFT_ROWS
from tests.conformance.vision.vision_rows import VISION_ROWS

_DOCS = Path(__file__).parents[2] / "docs"
_ADAPTER_ROWS = (*LORA_ROWS, *PEFT_ROWS, *OWN_ROWS, *EXPERT_ROWS, *MIXTURE_ROWS, *HEAD_ROWS)
_TABLES = {
    "families.md": {row.id: row for row in _ADAPTER_ROWS},
    "bases.md": {row.id: row for row in (*BASE_ROWS, *ENCODER_ROWS, *IMAGE_ROWS, *VISION_ROWS)},
}
# Types of PEFT without a row: all are refused as unknown or by name.
_WITHOUT_ROW = {
    "XLORA": "routes between other adapters with a second forward pass",
    "ADAMSS": "PEFT makes one only with scikit-learn",
    "SHADOW": "trains a second model beside the base",
}


def _lines(page: str) -> Iterator[tuple[str, list[str]]]:
    """(status, row ids) of each line of a page's tables that have these two columns."""
    header: list[str] = []
    for line in (_DOCS / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not header:
            header = cells
        elif "status" in header and "rows" in header and not set(cells[0]) <= set("-: "):
            assert len(cells) == len(header), f"{page}: {line}"
            yield cells[header.index("status")], re.findall(r"`(.+?)`", cells[header.index("rows")])


@pytest.mark.parametrize("page", _TABLES)
def test_the_documentation_calls_exact_what_a_row_shows(page: str) -> None:
    table = {**_TABLES["bases.md"], **_TABLES[page]}  # a base's rows carry adapters, too
    for status, ids in _lines(page):
        assert set(ids) <= set(table), f"{page} names rows that do not exist"
        for row in (table[name] for name in ids):
            served = row.refused is None and row.wrong is None
            assert served == status.startswith("exact"), f"{page}: {row.id} is {status!r}"
        assert ids or not status.startswith("exact"), f"{page}: nothing shows {status!r}"


@pytest.mark.parametrize("page", _TABLES)
def test_every_row_is_documented(page: str) -> None:
    named = [name for _, ids in _lines(page) for name in ids]
    assert set(_TABLES[page]) <= set(named)


def test_ids_are_unique_over_all_tables() -> None:
    ids = [row.id for row in (*_ADAPTER_ROWS, *BASE_ROWS, *ENCODER_ROWS)]
    assert len(ids) == len({*ids})


def test_every_type_of_peft_has_a_row_or_a_reason() -> None:
    types = {row.config().peft_type.value for row in (*LORA_ROWS, *PEFT_ROWS)}
    assert {kind.value for kind in peft.PeftType} == types | _WITHOUT_ROW.keys()
    assert not types & _WITHOUT_ROW.keys()
