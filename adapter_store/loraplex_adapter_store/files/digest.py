"""The identity of an adapter: sha256 over its canonical config, tensors and chat template.

The tenant is part of the digest, so that no tenant can see that another has the same adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from loraplex_adapter_store.plan import HeadPlan, PoolingPlan

from .safetensors_reader import SafetensorsFile

# Fields about the training, which are not part of the identity.
_NOT_IDENTITY = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode"),
        *("peft_version", "revision", "runtime_config"),
    }
)


def canonical_config(config: Mapping[str, object]) -> bytes:
    identity = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(
    config: Mapping[str, object],
    tensors: SafetensorsFile,
    chat_template: str | None = None,
    head: HeadPlan | None = None,
    pooling: PoolingPlan | None = None,
    tenant: str = "",
) -> str:
    """The digest does not depend on the order of tensors in the file, its padding or metadata."""
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
