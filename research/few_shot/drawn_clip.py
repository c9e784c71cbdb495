"""A small CLIP, pre-trained on drawings and saved as transformers saves one."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .drawings import COLOURS, DIGITS, KNOWN, SHAPES, SIDE, drawing

_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_WORDS = (*_SPECIAL, "a", "photo", "of", ".", *COLOURS, *SHAPES, *DIGITS)
_BATCH = 36  # drawings of a step, all of different labels
_LR = 2e-3
_WIDTH = 64


def save_drawn_clip(folder: Path, *, steps: int) -> Path:
    """Pre-train with CLIP's own loss on captions "a photo of a red circle." and save. Seeded."""
    torch.manual_seed(0)
    model = CLIPModel(_config())
    tokenizer, processor = (
        _tokenizer(),
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
    )
    texts = [f"a photo of a {label}." for label in KNOWN]
    captions = tokenizer(texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=max(1, steps))
    rng = random.Random(0)
    for _ in range(steps):
        rows = rng.sample(range(len(KNOWN)), _BATCH)
        images = [drawing(KNOWN[row], rng) for row in rows]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        inputs = {name: captions[name][rows] for name in ("input_ids", "attention_mask")}
        model(pixel_values=pixels, **inputs, return_loss=True).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config() -> Any:
    tower = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokens = {
        "vocab_size": len(_WORDS),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return AutoConfig.for_model(
        "clip",
        text_config={**tower, **tokens},
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=_WIDTH,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )
