"""Adapters in a directory are there at the start, with what their cards tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.registration import register_adapters
from loraplex_server.settings import StoreConfig
from tests.support.lora_files import write_lora


@pytest.mark.parametrize(
    ("card", "description", "examples"),
    [
        ({"description": "Says AB.", "examples": ["hi", "you"]}, "Says AB.", ("hi", "you")),
        ({"description": None, "examples": []}, "From the README.", ()),
        ({"description": 5, "examples": "x"}, "From the README.", ()),
        (None, "From the README.", ()),
    ],
)
def test_the_card_of_training_describes_an_adapter(
    tmp_path: Path,
    base_spec: BaseSpec,
    card: dict[str, object] | None,
    description: str,
    examples: tuple[str, ...],
) -> None:
    folder = write_lora(tmp_path / "adapters" / "echo", base_spec)
    (folder / "README.md").write_text("# echo\nFrom the README.\n")
    if card is not None:
        (folder / "card.json").write_text(json.dumps(card))
    store = AdapterStore(tmp_path / "state", base_spec)
    register_adapters(store, StoreConfig(adapters_dirs=(tmp_path / "adapters",), demos=False))
    shown = store.get("echo")
    assert (shown.description, shown.examples) == (description, examples)
    store.close()
