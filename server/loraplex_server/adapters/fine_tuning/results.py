"""Stores the adapter of a training run."""

from collections.abc import Sequence
from functools import partial

import torch

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.tenant_shares import TenantThreads

from .tuning import TuningRun


async def store_result(
    run: TuningRun,
    base_name: str,
    store: AdapterStore,
    names: Sequence[str],
    options: PutOptions,
    workers: TenantThreads,
    *,
    dtype: torch.dtype = torch.float32,
) -> AdapterCard:
    """Store the adapter of ``run`` under all ``names`` or under none. Raises StoreError."""
    upload = store.upload_folder()
    folder = await workers.run(run.tenant, upload.__enter__)
    try:
        await run.export(folder, base_name, dtype)

        def put_all() -> AdapterCard:
            config = (folder / "adapter_config.json").read_bytes()
            weights = folder / "adapter_model.safetensors"
            card = store.put_files(names[0], config, weights, options=options)
            try:
                for name in names[1:]:
                    store.put_files(name, config, weights, options=options)
            except StoreError:
                store.start_delete(names[0])
                raise
            return card

        return await workers.run(run.tenant, put_all)
    finally:
        await workers.run(run.tenant, partial(upload.__exit__, None, None, None))
