"""Tiny random vision-language models with a tokenizer and a processor, and made images."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from .tiny_tokenizer import tiny_tokenizer

IMAGE, IMAGE_ID = "<image>", 300  # behind the tokens of the tiny tokenizer
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIDE, _PATCH = 32, 8  # pixels of an image and of a patch
_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}


def save_tiny_vision(model_type: str, folder: Path) -> Path:
    """Save a model of ``llava`` or ``idefics3`` with its processor. Weights are as large as
    trained ones, so that images matter.
    """
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "idefics3": _idefics3}[model_type]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def made_image(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return an image of random colours in big squares."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(256, (5, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.NEAREST)


def png(image: Image.Image) -> str:
    """Return the image as base64 of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, *special]})
    tokenizer.pad_token = "<unk>"
    return tokenizer


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer()
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
        text_config={**_TEXT, "vocab_size": len(tokenizer)},
        image_token_id=IMAGE_ID,
    )
    size = {"height": _SIDE, "width": _SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=size),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    )
    config = Idefics3Config(
        vision_config=_VISION,
        text_config={**_TEXT, "vocab_size": len(tokenizer)},
        image_token_id=IMAGE_ID,
        scale_factor=2,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE}
        ),
        tokenizer,
        image_seq_len=(_SIDE // _PATCH) ** 2 // 4,
        chat_template=_TEMPLATE,
    )
    return Idefics3ForConditionalGeneration(config), processor
