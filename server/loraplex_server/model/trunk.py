"""The models that the engine serves: decoders and text encoders, whose adapters are the same."""

from .base_model import BaseModel
from .encoder.text_encoder import TextEncoder

Trunk = BaseModel | TextEncoder
