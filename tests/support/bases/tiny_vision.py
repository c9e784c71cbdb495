"""Tiny random vision-language models with a tokenizer and a processor, and made images."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
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
_SHUFFLE = 2  # patches of a token of Idefics 3, across and down
_SEQUENCE = (_SIDE // _PATCH // _SHUFFLE) ** 2  # its tokens of a tile
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
    """Save a model with its processor. Weights are as large as trained ones: images matter."""
    torch.manual_seed(0)
    model, processor = _MADE[model_type]()
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


def processor_of(folder: Path) -> Any:
    """Return transformers' processor of a saved model, without parts for videos."""
    model_type = AutoConfig.from_pretrained(folder).model_type
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model_type.startswith("qwen"):
        return _QwenProcessor(AutoImageProcessor.from_pretrained(folder), tokenizer)
    if model_type == "paligemma":
        return _PaliGemmaChats(AutoProcessor.from_pretrained(folder))
    if model_type != "smolvlm":
        return AutoProcessor.from_pretrained(folder)
    return Idefics3Processor(
        AutoImageProcessor.from_pretrained(folder),
        tokenizer,
        image_seq_len=_SEQUENCE,
        chat_template=tokenizer.chat_template,
    )


def _clip_processor(kind: Any, processor: Any, **options: Any) -> ProcessorMixin:
    size = {"height": _SIDE, "width": _SIDE}
    made: ProcessorMixin = processor(
        kind(size={"shortest_edge": _SIDE}, crop_size=size, **options),
        _tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return made


def _llava_config(kind: Any, **options: Any) -> Any:
    return kind(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
        text_config={**_TEXT, "vocab_size": IMAGE_ID + 1},
        image_token_id=IMAGE_ID,
        **options,
    )


def _gemma_config(kind: Any, text: str, n_words: int, patch: int, **options: Any) -> Any:
    return kind(
        vision_config={
            **_VISION,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "patch_size": patch,
        },
        text_config={
            **_TEXT,
            "model_type": text,
            "vocab_size": n_words,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "bos_token_id": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 12,  # shorter than an image
        },
        **options,
    )


def _gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer("<start_of_image>", "<end_of_image>")
    for name, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", IMAGE)):
        tokenizer._set_model_specific_special_tokens({f"{name}_token": token})
    config = _gemma_config(
        Gemma3Config,
        "gemma3_text",
        len(tokenizer),
        patch=_PATCH // 2,  # four patches are averaged to a token
        image_token_id=IMAGE_ID,
        mm_tokens_per_image=_SEQUENCE * 4,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": _SIDE, "width": _SIDE}),
        tokenizer,
        chat_template=_TEMPLATE.replace(IMAGE, "<start_of_image>"),
        image_seq_length=_SEQUENCE * 4,
    )
    return Gemma3ForConditionalGeneration(config), processor


def _paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = None
    images = SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    images.image_seq_length = _SEQUENCE * 4
    processor = PaliGemmaProcessor(images, tokenizer)  # adds tokens
    config = _gemma_config(
        PaliGemmaConfig,
        "gemma2",
        len(tokenizer),
        patch=_PATCH,
        image_token_index=IMAGE_ID,
        projection_dim=_TEXT["hidden_size"],
        hidden_size=_TEXT["hidden_size"],
    )
    return PaliGemmaForConditionalGeneration(config), processor


class _PaliGemmaChats:
    """PaliGemma's processor, which has no chat template and takes no text without images."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def apply_chat_template(self, chat: Any, **_: Any) -> str:
        return "".join(
            IMAGE if part["type"] == "image" else part["text"]
            for message in chat
            for part in message["content"]
        )

    def __call__(self, *, text: list[str], images: Any, return_tensors: str) -> Any:
        if images is not None:
            inputs = self._processor(text=text, images=images, return_tensors=return_tensors)
            inputs.pop("labels")
            return inputs
        tokenizer = self._processor.tokenizer
        return tokenizer(f"{tokenizer.bos_token}{text[0]}\n", return_tensors=return_tensors)


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    model = LlavaForConditionalGeneration(_llava_config(LlavaConfig))
    return model, _clip_processor(CLIPImageProcessorPil, LlavaProcessor)


def _llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    pinpoints = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    config = _llava_config(LlavaNextConfig, image_grid_pinpoints=pinpoints)
    processor = _clip_processor(
        LlavaNextImageProcessorPil, LlavaNextProcessor, image_grid_pinpoints=pinpoints
    )
    return LlavaNextForConditionalGeneration(config), processor


def _idefics3_like(
    config: Any, model: Any, image_processor: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    )
    processor = Idefics3Processor(
        image_processor(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE}),
        tokenizer,
        image_seq_len=_SEQUENCE,
        chat_template=_TEMPLATE,
    )
    made: PreTrainedModel = model(
        config(
            vision_config=_VISION,
            text_config={**_TEXT, "vocab_size": len(tokenizer)},
            image_token_id=IMAGE_ID,
            scale_factor=_SHUFFLE,
        )
    )
    return made, processor


class _QwenProcessor:
    """Qwen-VL's processor without its part for videos, which needs more packages."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self._images, self._tokenizer = image_processor, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        self._images.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def apply_chat_template(self, chat: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(chat, **options)

    def __call__(self, *, text: list[str], images: Any, return_tensors: str) -> dict[str, Any]:
        (expanded,), inputs = text, {}
        if images is not None:
            inputs = dict(self._images(images[0], return_tensors=return_tensors))
            for grid in inputs["image_grid_thw"]:
                n_tokens = int(grid.prod()) // self._images.merge_size**2
                expanded = expanded.replace(IMAGE, "@" * n_tokens, 1)
        ids = self._tokenizer(expanded.replace("@", IMAGE), return_tensors=return_tensors)
        types = ids["input_ids"].eq(IMAGE_ID).int()
        return {**ids, **inputs, "mm_token_type_ids": types}


def _qwen_vl(config: Any, model: Any, vision: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    tokenizer = _tokenizer()
    tokenizer.chat_template = _TEMPLATE
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    made: PreTrainedModel = model(
        config(
            vision_config={"patch_size": 4, "spatial_merge_size": _SHUFFLE, **vision},
            text_config={
                **_TEXT,
                "model_type": f"{config.model_type}_text",
                "vocab_size": len(tokenizer),
                "rope_parameters": rope,
            },
            image_token_id=IMAGE_ID,
            video_token_id=IMAGE_ID - 1,
        )
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=_SHUFFLE, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    return made, _QwenProcessor(images, tokenizer)


_MADE: Mapping[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "idefics3": lambda: _idefics3_like(
        Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil
    ),
    "smolvlm": lambda: _idefics3_like(
        SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil
    ),
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen2_5_vl": lambda: _qwen_vl(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "depth": 3,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen2_vl": lambda: _qwen_vl(
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        {"embed_dim": 32, "hidden_size": 64, "num_heads": 2, "depth": 3, "mlp_ratio": 2},
    ),
}
