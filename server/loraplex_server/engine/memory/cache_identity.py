"""Names what the numbers in a KV page depend on, besides its tokens and its adapter."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.defaults import kv_dtype
from loraplex_server.model.base_model import BaseModel

from .kv_cache import PAGE_SIZE, KvGeometry


def cache_identity(
    model: BaseModel, geometry: KvGeometry, config: EngineConfig, model_path: Path | None
) -> str:
    """Return a name of this base in this dtype, computed by this version of the kernels.

    The fingerprint samples the weights, so sizes and times of the base's files count, too.
    """
    parts: list[object] = [version("loraplex"), version("torch"), model.spec.fingerprint]
    parts += [model.dtype, kv_dtype(config, model), model.device.type, PAGE_SIZE, geometry]
    parts += [config.kernels, config.fuse, config.deterministic, config.attention_backend]
    if model_path is not None:
        for path in sorted(model_path.iterdir()):
            status = path.stat()
            parts.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
