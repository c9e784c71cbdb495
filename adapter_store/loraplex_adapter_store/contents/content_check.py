"""Compares the files of a content with its digest."""

from collections.abc import Mapping
from pathlib import Path

from loraplex_adapter_store.errors import AdapterRefused, StoredAdapterDamaged
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.digest import digest_of
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.names.name_record import Content

from .content_files import CHAT_TEMPLATE_FILE, CONFIG_FILE, PLAN_FILE, WEIGHTS_FILE
from .plan_file import read_plan


def check_content(
    content: Content, tenant: str, files: Mapping[str, Path], limits: StoreLimits
) -> None:
    """Compute the digest from every byte of ``files``. Raises StoredAdapterDamaged."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE) if name not in files]
    if missing:
        raise StoredAdapterDamaged(f"{', '.join(missing)} is missing")
    try:
        plan = read_plan(files[PLAN_FILE], content.plan_sha256)
        config = AdapterConfig.parse(files[CONFIG_FILE].read_bytes(), limits)
        template = files.get(CHAT_TEMPLATE_FILE)
        with SafetensorsFile(files[WEIGHTS_FILE], limits) as tensors:
            digest = digest_of(
                config.values,
                tensors,
                None if template is None else template.read_bytes().decode(),
                plan.head,
                plan.pooling,
                tenant,
            )
    except (AdapterRefused, OSError, ValueError, KeyError, TypeError) as error:
        raise StoredAdapterDamaged(str(error)) from error
    if not digest == plan.digest == content.digest:
        raise StoredAdapterDamaged("config, weights or chat template changed on disk")
