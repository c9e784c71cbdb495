"""Builds the tokenizer that a GGUF file describes, with its chat template."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraplex_server.model.errors import ModelError

from .gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Texts of tokens that end a turn, whatever the metadata says. llama.cpp has the same list.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|end_of_role|>", "</s>", "<eos>",
)  # fmt: skip
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text is cut before merges, by a pattern or in the usual way; True makes each digit a piece.
_CUTS: Mapping[str, str | bool] = {
    "default": False,
    "gpt-2": False,
    "smollm": True,
    "refact": True,  # and Granite
    "starcoder": True,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerBase:
    """Return the tokenizer. Raises ModelError for an unknown kind, by name."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(file)
    if kind != "llama":
        raise ModelError(
            f"{str(file.path)!r} has a tokenizer of the kind {kind!r}; gpt2 (byte-level BPE) and "
            "llama (SentencePiece) are read"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"the tokenizer of {str(file.path)!r} cannot be read: {error}") from error
    return tokenizer


def end_token_ids(file: GgufFile) -> list[int]:
    """Return the tokens that end an answer."""
    ids = {file.integer(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")}
    ids |= {i for i, token in enumerate(_tokens(file)) if token in _ENDS}
    return sorted(i for i in ids if i is not None)


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{str(file.path)!r} has no tokenizer.ggml.tokens")
    return tokens


def _byte_level(file: GgufFile) -> PreTrainedTokenizerBase:
    tokens = _tokens(file)
    merges = (merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
    pairs = [(left, right) for left, _, right in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = _pre_tokenizer(file)
    backend.decoder = decoders.ByteLevel()
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    assert isinstance(types, list)
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, own in zip(tokens, types, strict=False)
            if own == kind
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)
    special: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        token_id = file.integer(f"tokenizer.ggml.{key}")
        special[name] = None if token_id is None else tokens[token_id]
    if file.metadata.get("tokenizer.ggml.add_bos_token") and special["bos_token"]:
        bos = special["bos_token"]
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos} $B",
                    special_tokens=[(bos, tokens.index(bos))],
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _pre_tokenizer(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _CUTS:
        raise ModelError(
            f"{str(file.path)!r} cuts text by {name!r} (tokenizer.ggml.pre); these are read: "
            f"{', '.join(_CUTS)}"
        )
    cut = _CUTS[name]
    if isinstance(cut, str):
        split = pre_tokenizers.Split(Regex(cut), behavior="isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if not cut:
        return level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
