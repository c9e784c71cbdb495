"""The identity of an adapter: sha256 over its canonical config, tensors and chat template.

Tenants with the same adapter have two contents: neither sees in its own that another has it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .plan import HeadPlan, PoolingPlan
from .safetensors_reader import SafetensorsFile

__all__ = ["canonical_config", "digest_of"]

# Where and with what an adapter was trained, not what it is.
_NOT_IDENTITY = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
    }
)


def canonical_config(config: Mapping[str, object]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(
    config: Mapping[str, object],
    tensors: SafetensorsFile,
    chat_template: str | None = None,
    head: HeadPlan | None = None,
    pooling: PoolingPlan | None = None,
    tenant: str = "",
) -> str:
    """Independent of the order of tensors in the file and of its padding and metadata."""
    digest = hashlib.sha256(b"loraplex-adapter-1\0")
    _frame(digest, canonical_config(config))
    _frame(digest, b"" if chat_template is None else chat_template.encode())
    if head is not None:  # its labels and activation may come from another file
        _frame(digest, json.dumps([head.task.value, head.labels, head.activation.value]).encode())
    if pooling is not None:
        _frame(digest, json.dumps([pooling.mode.value, pooling.normalize]).encode())
    if tenant:
        _frame(digest, tenant.encode())
    for name in sorted(tensors.entries):
        entry = tensors.entries[name]
        _frame(digest, json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        with tensors.raw(name) as data:
            digest.update(data)
    return digest.hexdigest()


def _frame(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
