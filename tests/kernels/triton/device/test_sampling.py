"""The sampling kernel takes the reference's tokens, and changes logits as it does."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.formats.sampling_batch import SamplingBatch, pack_batch
from loraplex_kernels.reference.sampling import sample_tokens_reference
from loraplex_kernels.triton import sampling as sampling_kernel
from loraplex_kernels.triton.sampling import sample_tokens_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _arrays(n: int, vocab_size: int, seed: int) -> dict[str, NDArray[np.generic]]:
    """Every parameter in some rows: greedy and random, filtered and not, edited, masked, forced."""
    dice = np.random.default_rng(seed)

    def some(values: list[float], off: float, share: float = 0.5) -> NDArray[np.float64]:
        return np.where(dice.random(n) < share, dice.choice(values, n), off)

    n_edits = dice.choice([0, 0, 1, 3, vocab_size // 2], n)
    n_words, n_masks = -(-vocab_size // 32), n // 3
    masks = dice.integers(-(2**31), 2**31, (n_masks, n_words))
    masks &= dice.integers(-(2**31), 2**31, (n_masks, n_words))
    masks[0] = 0
    masks[0, (vocab_size - 1) // 32] = 1 << ((vocab_size - 1) % 32)  # the last token alone
    mask_rows = np.full(n, -1)
    mask_rows[dice.permutation(n)[:n_masks]] = np.arange(n_masks)
    return {
        "uniforms": dice.random(n),
        "top_p": some([0.0, 0.01, 0.5, 0.9, 0.999], 1.0),
        "temperatures": some([0.0, 1e-6, 0.4, 1.0, 3.0], 1.0, 0.8),
        "min_weights": some([1e-6, 0.1, 1.0], 0.0, 0.3),
        "penalties": np.stack(
            [some([0.5, 1.7], 1.0), some([-1.0, 0.8], 0.0), some([-0.2, 0.9], 0.0)], axis=1
        ),
        "top_k": some([1, 2, 17, vocab_size - 1, vocab_size, 5 * vocab_size], 0).astype(np.int32),
        "must_choose": dice.integers(0, 2, n),
        "forced": some([0, vocab_size - 1], -1, 0.1).astype(np.int32),
        "logprob_rows": np.empty(0),
        "edit_starts": np.cumsum([0, *n_edits]),
        "edit_tokens": np.concatenate(
            [dice.permutation(vocab_size)[:count] for count in n_edits] or [np.empty(0)]
        ),
        "edit_biases": dice.choice([0.0, 2.5, -7.0, -np.inf], n_edits.sum()),
        "edit_counts": dice.choice([-1, 0, 1, 4], n_edits.sum()),
        "mask_rows": mask_rows,
        "masks": masks.astype(np.uint32).view(np.int32),
    }


def _batch(n: int, vocab_size: int, seed: int, device: torch.device) -> SamplingBatch:
    return pack_batch(_arrays(n, vocab_size, seed), device)


def _logits(n: int, vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab_size, generator=generator)
    logits *= torch.tensor([0.01, 1.0, 4.0, 30.0]).repeat(n)[:n, None]
    logits[1::5] = logits[1::5].bfloat16().float()
    logits[2::5] = logits[2::5].round()  # many ties, zeros of both signs among them
    logits[3::7] = torch.where(logits[3::7] < 0, -torch.inf, logits[3::7])
    logits[n // 2] = 5.0
    return logits


@pytest.mark.parametrize(("vocab_size", "block"), [(33, 64), (150, 64), (700, 64)])
def test_tokens_and_logits_equal_the_reference(
    device: torch.device,
    vocab_size: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling_kernel, "_CHUNK", block)
    n = 15 if INTERPRETED else 2000
    batch = _batch(n, vocab_size, 1, device)
    logits = _logits(n, vocab_size, 1).to(device)
    wanted_logits = logits.clone()
    wanted = sample_tokens_reference(wanted_logits, batch)
    found = sample_tokens_triton(logits, batch)
    assert torch.equal(found, wanted)
    is_sampled = batch.forced < 0  # a forced row is left as it is
    torch.testing.assert_close(logits[is_sampled], wanted_logits[is_sampled], rtol=1e-6, atol=0)
    assert len(set(found.tolist())) > 4


@pytest.mark.nightly
def test_a_row_of_a_large_vocabulary_is_split_and_equals_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size, n = 128_256, 3
    monkeypatch.setattr(sampling_kernel, "_SCRATCH", 2 * 63 * 2048)  # the third row is on its own
    arrays = _arrays(n, vocab_size, 6) | {
        "temperatures": np.ones(n),
        "forced": np.full(n, -1),
        "top_p": np.array([0.9, 0.9, 1.0]),
        "top_k": np.array([40, 0, 100_000]),
    }
    batch = pack_batch(arrays, device)
    logits = _logits(n, vocab_size, 6).to(device)
    wanted = sample_tokens_reference(logits.clone(), batch)
    assert torch.equal(sample_tokens_triton(logits, batch), wanted)


def test_a_row_without_a_probability_says_so(device: torch.device) -> None:
    arrays = _arrays(6, 70, 0) | {
        "temperatures": np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]),
        "must_choose": np.zeros(6),
        "forced": np.full(6, -1),
        "edit_starts": np.zeros(7),
        **dict.fromkeys(("edit_tokens", "edit_biases", "edit_counts"), np.empty(0)),
        "mask_rows": np.full(6, -1),
    }
    batch = pack_batch(arrays, device)
    logits = torch.zeros(6, 70, device=device)
    logits[:2] = -torch.inf
    logits[2:4, 7] = torch.inf
    logits[4:, 7] = torch.nan
    wanted = [-1, -1, -1, 7, -1, -1]
    assert sample_tokens_reference(logits.clone(), batch).tolist() == wanted
    assert sample_tokens_triton(logits.clone(), batch).tolist() == wanted
    must = replace(batch, must_choose=torch.ones_like(batch.must_choose))
    wanted[:2] = [0, 0]
    assert sample_tokens_reference(logits.clone(), must).tolist() == wanted
    assert sample_tokens_triton(logits.clone(), must).tolist() == wanted


def test_memory_around_the_rows_is_neither_read_nor_written(device: torch.device) -> None:
    vocab_size = 45
    around = torch.full((7, vocab_size), torch.nan, device=device)
    batch = _batch(5, vocab_size, 3, device)
    logits = _logits(5, vocab_size, 3).to(device)
    around[1:6] = logits
    found = sample_tokens_triton(around[1:6], batch)
    assert torch.equal(found, sample_tokens_reference(logits, batch))
    assert bool(around[0].isnan().all())
    assert bool(around[6].isnan().all())


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = _batch(4, 40, 0, device)
    with pytest.raises(ValueError, match="float32"):
        sample_tokens_triton(torch.zeros(4, 40, dtype=torch.bfloat16, device=device), batch)
    with pytest.raises(ValueError, match="rows, not 3"):
        sample_tokens_triton(torch.zeros(3, 40, device=device), batch)
    with pytest.raises(ValueError, match="do not hold"):
        sample_tokens_triton(torch.zeros(4, 400, device=device), batch)
