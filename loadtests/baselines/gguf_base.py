"""Finds the GGUF file of a base, and writes one of Llama-3.2-1B's shape with random blocks.

    python -m loadtests.baselines.gguf_base /tmp/1b-Q4_K.gguf --type Q4_K
    python -m loadtests.baselines.gguf_base /tmp/1b-qwen2.gguf --architecture qwen2

mistral.rs refuses adapters on files of Llama, and takes them on those of Qwen 2, which have biases.
The time of a step depends on the shape and the type of the blocks, not on their values. Tokenizer
and chat template are those of the default base; rows of the embedding beyond its tokens are zero.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from loraplex_server.model.loading.pull import resolve_model

_T = GGMLQuantizationType
# The 16-bit numbers of a block, by their place: random blocks are then weights of about ±0.02.
_SCALES: Mapping[GGMLQuantizationType, Mapping[int, float]] = {
    _T.Q8_0: {0: 0.02 / 74},
    _T.Q4_0: {0: 0.02 / 4.6},
    _T.Q4_K: {0: 0.02 / 170, 2: 7.5 * 0.02 / 170},
    _T.Q6_K: {208: 0.02 / 1350},
}
_TYPES = (_T.Q8_0, _T.Q4_0, _T.Q4_K)
_OF_THE_EMBEDDING = {_T.Q8_0: _T.Q8_0}  # else Q6_K, as llama-quantize chooses for a tied head
_BIASED = ("attn_q", "attn_k", "attn_v")  # of Qwen 2
_LLAMA_1B: Mapping[str, int] = {
    "vocabulary": 128_256,
    "hidden": 2048,
    "wide": 8192,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
}


def gguf_of(model: Path) -> Path | None:
    """Return the GGUF file of a base's folder; None if it holds other weights."""
    path = model / "model.gguf"
    return path.resolve() if path.exists() else None


def write_random_gguf(
    path: Path, type: GGMLQuantizationType, *, architecture: str = "llama"
) -> None:
    """Write a base of Llama 3.2 1B's shape, all matrices in blocks of ``type``."""
    shape = _LLAMA_1B
    writer = GGUFWriter(path, architecture)
    hidden, heads = shape["hidden"], shape["heads"]
    head_dim = hidden // heads
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["wide"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500_000.0)
    n_tokens = _add_tokenizer(writer, shape["vocabulary"])
    of_embedding = _OF_THE_EMBEDDING.get(type, _T.Q6_K)
    embedding = _random_blocks(shape["vocabulary"], hidden, of_embedding, seed=0)
    embedding[n_tokens:] = 0
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=of_embedding)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    kv = shape["kv_heads"] * head_dim
    widths = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (shape["wide"], hidden),
        "ffn_up": (shape["wide"], hidden),
        "ffn_down": (hidden, shape["wide"]),
    }
    for layer in range(shape["layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
        for number, (name, (n_out, n_in)) in enumerate(widths.items()):
            blocks = _random_blocks(n_out, n_in, type, seed=1 + 16 * layer + number)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=type)
            if architecture == "qwen2" and name in _BIASED:
                bias = np.zeros(n_out, dtype=np.float32)
                writer.add_tensor(f"blk.{layer}.{name}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(
    n_out: int, n_in: int, type: GGMLQuantizationType, *, seed: int
) -> NDArray[np.uint8]:
    n_values, n_bytes = GGML_QUANT_SIZES[type]
    shape = (n_out, n_in // n_values, n_bytes)
    blocks = np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape))), dtype=np.uint8)
    blocks = blocks.reshape(shape).copy()
    for at, size in _SCALES[type].items():
        blocks[:, :, at : at + 2] = np.array([size], dtype=np.float16).view(np.uint8)
    return blocks.reshape(n_out, -1)


def _add_tokenizer(writer: GGUFWriter, n_rows: int) -> int:
    """Add the default base's tokenizer, with unused tokens up to ``n_rows``; return its size."""
    from transformers import AutoTokenizer  # takes seconds to import

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model())
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    n_unused = max(0, n_rows - len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"<unused_{index}>" for index in range(n_unused))])
    kinds = [3 if token in special else 1 for token in tokens]
    writer.add_token_types([*kinds, *[5] * n_unused])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    return len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_K", choices=[type.name for type in _TYPES])
    parser.add_argument("--architecture", default="llama", choices=["llama", "qwen2"])
    options = parser.parse_args()
    write_random_gguf(options.out, _T[options.type], architecture=options.architecture)


if __name__ == "__main__":
    main()
