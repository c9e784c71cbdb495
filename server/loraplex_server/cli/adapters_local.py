"""`loraplex adapters` without a server: the store of a base model on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import MalformedFile
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.reader import read_adapter
from loraplex_adapter_store.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.sources.local import read_directory
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.model.pull import loraplex_home, resolve_model
from loraplex_server.settings import StoreConfig

__all__ = ["LocalAdapters"]


class LocalAdapters:
    """Loads the base model on first use: adapters are checked against its weights."""

    def __init__(self, model: str | None, state_dir: Path | None) -> None:
        self._model = model
        self._state_dir = state_dir

    @cached_property
    def base(self) -> BaseSpec:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = resolve_model(self._model)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
        return BaseSpec.of(model, self._model or path.name)

    def list(self) -> list[dict[str, Any]]:
        with self._store() as store:
            return [card.to_json() for card in store.list()]

    def show(self, name: str) -> dict[str, Any]:
        with self._store() as store:
            return store.get(name).to_json()

    def add(
        self,
        name: str,
        source: str,
        description: str | None,
        examples: tuple[str, ...],
        *,
        replace: bool,
    ) -> dict[str, Any]:
        # The operator's own command line may read what the operator may read.
        with self._store(roots=[Path("/")]) as store:
            card = store.put_source(
                name,
                source,
                options=PutOptions(description=description, examples=examples, replace=replace),
                with_card=_told_by_card,
            )
            return card.to_json()

    def remove(self, name: str) -> dict[str, Any]:
        with self._store() as store:
            return store.delete(name).to_json()

    def revisions(self, name: str) -> Sequence[dict[str, Any]]:
        with self._store() as store:
            return [card.to_json() for card in store.revisions(name)]

    def rollback(self, name: str, digest: str | None) -> dict[str, Any]:
        with self._store() as store:
            return store.rollback(name, digest_prefix=digest).to_json()

    def read(self, source: str) -> tuple[AdapterPlan, dict[str, Any]]:
        """A folder that is in no store yet, or a name of the store, with its load report."""
        limits = StoreLimits()
        if Path(source).is_dir():
            files = read_directory(Path(source), limits)
            config = AdapterConfig.parse(files.config, limits)
            with SafetensorsFile(files.weights, limits) as tensors:
                reading = read_adapter(
                    config,
                    tensors,
                    self.base,
                    limits,
                    chat_template=files.chat_template,
                    companions=files.companions,
                )
            return reading.plan, reading.report.to_json()
        with self._store() as store:
            report = store.get(source).report
            assert report is not None
            with store.acquire(source) as lease:
                return lease.plan, report.to_json()

    def _store(self, roots: Sequence[Path] = ()) -> AdapterStore:
        from loraplex_server.engine.capabilities import EngineCapabilities

        root = self._state_dir or loraplex_home() / "adapters" / self.base.fingerprint[:16]
        return AdapterStore(
            root,
            self.base,
            allowed_roots=roots,
            check=EngineCapabilities.of(self.base).check,
            n_kept_revisions=StoreConfig().keep_revisions,
        )


def _told_by_card(text: bytes, options: PutOptions) -> PutOptions:
    """As over HTTP. Raises MalformedFile."""
    from loraplex_server.adapters.card_file import told_by_card
    from loraplex_server.api.errors import ApiError

    try:
        return told_by_card(text, options)
    except ApiError as error:
        raise MalformedFile(error.message) from error
