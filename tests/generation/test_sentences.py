"""The sentence encoder: unit vectors that depend on their text alone, from any thread."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraplex_generation.sentences import MAX_TOKENS, SentenceEncoder

TEXTS = ["a cat", "A much longer sentence about the weather in Lisbon in spring.", "kitten"]


@pytest.fixture(scope="module")
def encoder(pulled_encoder: Path) -> SentenceEncoder:
    return SentenceEncoder(pulled_encoder)


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(encoder: SentenceEncoder) -> None:
    together = encoder.encode(TEXTS).sentence
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    alone = torch.cat([encoder.encode([text]).sentence for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert float(together[0] @ together[2]) > float(together[0] @ together[1])
    long = "word " * (3 * MAX_TOKENS)
    assert encoder.encode([long]).tokens.shape == (1, MAX_TOKENS, encoder.width)


def test_the_quick_vectors_move_cosines_by_less_than_a_hundredth(encoder: SentenceEncoder) -> None:
    exact, quick = encoder.encode(TEXTS).sentence, encoder.sentences(TEXTS)
    assert quick.dtype is torch.float32
    assert float((exact @ exact.T - quick @ quick.T).abs().max()) < 0.01


def test_eight_threads_encode_texts_of_all_lengths_at_once(encoder: SentenceEncoder) -> None:
    texts = [["word " * n] for n in range(1, 33)]
    expected = [encoder.encode(batch).sentence for batch in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: encoder.encode(batch).sentence, texts))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
