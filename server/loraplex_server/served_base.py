"""The base model as the front needs it: names, folders and pooling."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.files.companion_files import read_pooling
from loraplex_adapter_store.files.file_names import MODULES_FILE, POOLING_FILE
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import HeadPlan, PoolingPlan

from .adapters.device_tier import DeviceTier
from .engine.adapters.expert_monitor import ExpertMonitor
from .engine.requests.client import EngineClient
from .model.encoder.image_reader import ImageReader
from .model.resident_weights import ResidentWeights
from .settings.config import ServerConfig


class FrontEngine(EngineClient, DeviceTier, Protocol):
    """Generates, and holds adapters on devices."""


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base model and its engine."""

    engine: FrontEngine
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    name: str  # public name
    path: Path
    experts: ExpertMonitor | None  # None: the engine runs in other processes
    weights: ResidentWeights | None  # for training; None: the weights of the file are mapped
    head: HeadPlan | None = None  # of a base that is a classifier itself
    writes_text: bool = True  # False: an encoder
    image_encoder: ImageReader | None = None


def store_root(config: ServerConfig, spec: BaseSpec) -> Path:
    """Return the folder that stores the adapters of this base."""
    from .model.loading.pull import loraplex_home

    return config.store.root or loraplex_home() / "adapters" / spec.fingerprint[:16]


def pooling_of_base(model_path: Path) -> PoolingPlan | None:
    """Return the pooling of a sentence-transformers model, or None.

    Raises AdapterRefused for an unknown pooling mode.
    """
    present = [name for name in (MODULES_FILE, POOLING_FILE) if (model_path / name).is_file()]
    return read_pooling({name: (model_path / name).read_bytes() for name in present}, StoreLimits())
