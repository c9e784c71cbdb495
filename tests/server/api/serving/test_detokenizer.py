"""Streaming detokenisation never splits a character and loses nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex_server.text.detokenizer import StreamDetokenizer
from loraplex_server.text.token_text import TokenTexts
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer().backend_tokenizer


def _sentencepiece_like() -> Tokenizer:
    """Llama-2 style: ▁ for spaces, a token for each byte as fallback, leading space stripped."""
    words = ["▁hello", "▁world", "▁", "a", "b", "▁a", "é", "中"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


SENTENCEPIECE = _sentencepiece_like()


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60), st.booleans())
def test_the_pieces_of_any_ids_join_to_the_one_shot_decode(ids: list[int], skip: bool) -> None:
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(BYTE_LEVEL, ids, skip_special_tokens=skip)) == whole


@settings(deadline=None, max_examples=400)
@given(st.text(max_size=80))
def test_text_survives_with_emoji_cjk_and_combining_marks(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    pieces = streamed(BYTE_LEVEL, ids, skip_special_tokens=False)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧‍👦 family", "你好，世界", "naïve café", "🇩🇪🏳️‍🌈", "a\u0301\u0323"]
)
def test_no_piece_holds_half_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    pieces = streamed(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


words = st.integers(256, SENTENCEPIECE.get_vocab_size() - 1).map(lambda token_id: [token_id])
characters = st.characters(codec="utf-8").map(lambda character: list(character.encode()))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(words | characters, max_size=30).map(lambda parts: [i for part in parts for i in part])
)
def test_byte_fallback_vocabularies_stream_like_they_decode(ids: list[int]) -> None:
    """For whole characters: a broken byte makes that decoder take back what it said before."""
    assert "".join(streamed(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


def test_the_prompt_gives_the_first_token_its_leading_space() -> None:
    hello, world = 256, 257
    detokenizer = StreamDetokenizer(SENTENCEPIECE, context=[hello])
    assert detokenizer.push(world) == " world"
    assert StreamDetokenizer(SENTENCEPIECE).push(world) == "world"


def test_a_prompt_that_ends_inside_a_character_adds_nothing_to_the_output() -> None:
    first, *rest = BYTE_LEVEL.encode("😀", add_special_tokens=False).ids
    detokenizer = StreamDetokenizer(BYTE_LEVEL, context=[first])
    text = "".join(detokenizer.push(token_id) for token_id in rest) + detokenizer.flush()
    assert "Hello" not in text
    assert len(text) <= len(rest)


def test_a_run_of_broken_bytes_is_not_held_for_ever() -> None:
    broken = BYTE_LEVEL.token_to_id("Ģ")  # byte 0x80: never starts a character
    pieces = streamed(BYTE_LEVEL, [broken] * 1000)
    assert max(len(piece) for piece in pieces) <= 64
    assert "".join(pieces) == "\ufffd" * 1000


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_token_bytes_join_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    ids = [256, 257, 0xF0, 0x9F, 0x98, 0x80] if tokenizer is SENTENCEPIECE else None
    if ids is None:
        ids = tokenizer.encode("Grüße 😀 你好\n", add_special_tokens=False).ids
    raw = b"".join(texts.get(token_id).raw for token_id in ids)
    assert raw.decode().strip(" ") == tokenizer.decode(ids, skip_special_tokens=False).strip(" ")


def test_broken_tokens_have_unique_names_and_ids_beyond_the_vocabulary_are_empty() -> None:
    texts = TokenTexts(BYTE_LEVEL)
    names = [texts.get(token_id).unique for token_id in range(BYTE_LEVEL.get_vocab_size())]
    assert len(set(names)) == len(names)
    assert texts.get(10**6).raw == b""
    assert json.dumps(names)
