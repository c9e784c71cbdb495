"""Writes a base of Llama-3.1-8B's shape with random weights, which measure speed as well.

Its tokenizer has a token for each byte and is made here, so no file is needed. Rows of the output
head beyond it are zero, so that greedy decoding never picks a token that has no text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

# https://huggingface.co/meta-llama/Llama-3.1-8B: its config.json
LLAMA_8B: Mapping[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TINY: Mapping[str, Any] = {
    **LLAMA_8B,
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_STD = 0.02
_SPECIAL = ("<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_model(shape: Mapping[str, Any], folder: Path) -> Path:
    """Write a bfloat16 checkpoint with one file for each layer. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        **shape,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)
    weight_map = {}
    for number, tensors in enumerate(_files(shape, len(tokenizer))):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*_SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _files(shape: Mapping[str, Any], n_tokens: int) -> Iterator[dict[str, Tensor]]:
    hidden, wide, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head_dim = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(0)

    def random(n_out: int, n_in: int) -> Tensor:
        return torch.empty(n_out, n_in, dtype=torch.bfloat16).normal_(0, _STD, generator=generator)

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    head = random(vocab, hidden)
    head[n_tokens:] = 0
    yield {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": ones(),
        "lm_head.weight": head,
    }
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield {
            **{f"{prefix}.{name}.weight": random(*width) for name, width in widths.items()},
            f"{prefix}.input_layernorm.weight": ones(),
            f"{prefix}.post_attention_layernorm.weight": ones(),
        }
