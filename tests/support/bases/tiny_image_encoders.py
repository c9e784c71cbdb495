"""Tiny random image encoders on disk, with their image processors and tokenizers."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.support.bases.tiny_encoders import WORDS

_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_SIDE = 32  # pixels of a processed image
_LABELS = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {**_TOWER, "image_size": _SIDE, "patch_size": 8}
_TEXT = {
    **_TOWER,
    "vocab_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_CONFIGS: Mapping[str, dict[str, Any]] = {
    "vit": {**_VISION, **_LABELS},
    "dinov2": {**_VISION, **_LABELS, "image_size": 40, "mlp_ratio": 2, "layerscale_value": 0.7},
    "clip": {
        "text_config": _TEXT,
        "vision_config": {**_VISION, "hidden_size": 24},
        "projection_dim": 20,
        "logit_scale_init_value": 1.5,
    },
    "siglip": {"text_config": _TEXT, "vision_config": _VISION},
}
TWO_TOWERS = ("clip", "siglip")


def tiny_image_encoder(model_type: str, **fields: Any) -> PreTrainedModel:
    """Return a classifier of two labels, or a model with two towers, whose weights all matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_CONFIGS[model_type], **fields})
    kind = AutoModel if model_type in TWO_TOWERS else AutoModelForImageClassification
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
            elif not name.startswith("logit_"):
                parameter += 0.1 * torch.randn_like(parameter)
    if model_type == "siglip":
        model.logit_scale.data.fill_(1.2)
        model.logit_bias.data.fill_(-0.7)
    return model.eval()


def save_tiny_image_encoder(
    model_type: str, folder: Path, *, processor: bool = True, **fields: Any
) -> Path:
    """Save the model, with its image processor and tokenizer."""
    tiny_image_encoder(model_type, **fields).save_pretrained(folder)
    if processor:
        _processor(model_type).save_pretrained(folder)
    if model_type in TWO_TOWERS:
        _tokenizer(model_type).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 45, height: int = 30) -> Image.Image:
    """Return an image with structure: a colour gradient under large random blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (1, 3, 4, 5), generator=generator).float()
    pixels = torch.nn.functional.interpolate(blocks, (height, width))[0]
    return Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())


def data_url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _processor(model_type: str) -> Any:
    match model_type:
        case "clip" | "dinov2":
            return CLIPImageProcessorPil(
                size={"shortest_edge": _SIDE + 4}, crop_size={"height": _SIDE, "width": _SIDE}
            )
        case "siglip":
            return SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
        case _:
            return ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE})


def _tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if model_type == "clip" else "$A </s>",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=16,
        model_input_names=["input_ids"]
        if model_type == "siglip"
        else ["input_ids", "attention_mask"],
    )
