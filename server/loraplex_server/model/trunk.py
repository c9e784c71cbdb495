"""The models that the engine serves: decoders and encoders, whose adapters are the same."""

from .base_model import BaseModel
from .encoder.encoder import Encoder

Trunk = BaseModel | Encoder
