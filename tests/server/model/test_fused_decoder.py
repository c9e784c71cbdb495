"""The layers in one native call have the bits of the layers operator by operator."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.formats.factors import SliceFactors
from loraplex_kernels.formats.layout import LoraSegments, LoraTarget
from loraplex_kernels.lora.native_decoder import LogitsRows
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments
from loraplex_server.engine.memory.kv_cache import KvCache, KvGeometry
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.engine.steps.forward_batch import build_batch
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.fused_decoder import FusedDecoder
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model

_CPU = torch.device("cpu")
_LENGTHS = (40, 21, 33, 1)  # tokens of the requests; the first goes in one chunk, the rest decode
_MIXES = {
    "no adapter": None,
    "some rows": [0, -1, 1, -1],
    "every row": [1, 0, 1, 0],
    "a large rank": [2, 0, 2, 1],
}

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels here")


class Layers:
    """A tiny model with a pool of three adapters, on the second step of four requests."""

    def __init__(self, model_type: str, dtype: torch.dtype) -> None:
        model = copy.deepcopy(tiny_model(model_type)).to(dtype)
        self.base = BaseModel(model, "tiny")
        self.decoder: FusedDecoder = self.base.fused  # type: ignore[assignment]
        self.kv = KvCache(
            KvGeometry(len(self.base.layers), self.base.n_kv_heads, self.base.head_dim),
            n_pages=20,
            page_size=16,
            max_requests=8,
            max_model_len=256,
            dtype=dtype,
            device=_CPU,
            prefix_cache=False,
        )
        self.base.attach_kv(self.kv.keys, self.kv.values)
        targets = [group.target for group in self.base.groups.values()]
        self.pool = LoraPool(targets, n_bytes=8 << 20, n_slots=4, dtype=dtype)
        for group in self.base.groups.values():
            group.lora = PreparedTarget(self.pool, group.target.name)
        for rank in (4, 16):
            self.add_adapter(rank)
        self.requests = []
        for index, length in enumerate(_LENGTHS):
            ids = torch.randint(VOCAB_SIZE, (length,)).tolist()
            source = GenerationRequest(f"r{index}", tuple(ids), SamplingParams(max_tokens=1))
            self.requests.append(Request(source, print, ids, length))
            self.kv.admit(f"r{index}", bytes(16), ids)

    def add_adapter(self, rank: int) -> None:
        factors = {target.name: _factors(target, rank) for target in self.pool.targets.values()}
        entry = self.pool.reserve(self.pool.pack(factors))
        self.pool.fill(entry)
        self.pool.publish(entry)

    def run(
        self,
        layers: Callable[[Tensor], Tensor],
        mix: list[int] | None,
        kept: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(hidden states of both steps, the cache) from an empty cache.

        ``kept`` rows of each step, None for all.
        """
        for cache in (*self.kv.keys, *self.kv.values):
            cache.zero_()
        first = [
            ScheduledChunk(r, 0, max(n - 1, 0))
            for r, n in zip(self.requests, _LENGTHS, strict=True)
        ]
        last = [ScheduledChunk(r, n - 1, 1) for r, n in zip(self.requests, _LENGTHS, strict=True)]
        hidden = []
        steps = ([chunk for chunk in first[1:] if chunk.n_tokens], [first[0], *last[1:]])
        for index, chunks in enumerate(steps):
            batch = build_batch(chunks, self.kv, _CPU)
            step = self.base.step
            batch.bind(step)
            rows = [
                -1 if mix is None else mix[self.requests.index(chunk.request)]
                for chunk in chunks
                for _ in range(chunk.n_tokens)
            ]
            step.segments = None if mix is None else _segments(rows)
            if kept is not None:
                part = None if mix is None else _segments([rows[row] for row in kept[index]])
                step.logits_rows = LogitsRows(torch.tensor(kept[index], dtype=torch.int64), part)
            with torch.inference_mode():
                hidden.append(layers(self.base.embed(batch.token_ids)))
        return torch.cat(hidden), torch.stack([*self.kv.keys, *self.kv.values])


def _segments(entries: Sequence[int]) -> LoraSegments:
    return build_segments(torch.tensor(entries, dtype=torch.int32))


def _factors(target: LoraTarget, rank: int) -> list[SliceFactors | None]:
    return [
        SliceFactors(a=0.1 * torch.randn(rank, target.in_features), b=torch.randn(width, rank))
        for width in target.out_features
    ]


def _refuse(_: Tensor) -> Tensor:
    raise AssertionError("the step went operator by operator")


@pytest.mark.parametrize("mix", _MIXES.values(), ids=_MIXES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_one_native_call_has_the_same_bits(
    model_type: str, dtype: torch.dtype, mix: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Layers(model_type, dtype)
    layers.run(layers.decoder, _MIXES["every row"])  # binds it before the tables grow
    if mix is not None and 2 in mix:
        layers.add_adapter(40)
    expected = layers.run(layers.decoder.run_by_layer, mix)
    monkeypatch.setattr(layers.decoder, "run_by_layer", _refuse)
    found = layers.run(layers.decoder, mix)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert expected[1].count_nonzero() > 0


@pytest.mark.parametrize("mix", _MIXES.values(), ids=_MIXES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kept_rows_have_the_bits_that_they_have_among_all(
    dtype: torch.dtype, mix: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Layers("llama", dtype)
    layers.add_adapter(40)
    every, cache = layers.run(layers.decoder, mix)
    n_first = sum(n - 1 for n in _LENGTHS[1:])  # rows of the first step
    monkeypatch.setattr(layers.decoder, "run_by_layer", _refuse)
    for kept in (((19, 51), (38, 39, 41)), ((), (7,)), ((0, 19, 20), ())):
        found, written = layers.run(layers.decoder, mix, kept)
        assert torch.equal(found, every[[*kept[0], *(n_first + row for row in kept[1])]])
        assert torch.equal(written, cache)


def test_a_segment_that_does_not_fit_is_told_even_if_no_row_is_kept() -> None:
    layers = Layers("llama", torch.bfloat16)
    layers.decoder._layers = layers.decoder._layers[:1]  # the first layer is where rows are left
    with pytest.raises(IndexError):
        layers.run(layers.decoder, [9, -1, 9, -1], ((), ()))


def test_kept_rows_are_picked_where_the_layers_go_one_by_one() -> None:
    layers = Layers("llama", torch.bfloat16)
    every, _ = layers.run(layers.decoder.run_by_layer, _MIXES["some rows"])
    mlps = {0: layers.base.mlps["model.layers.0.mlp"].run}
    layers.decoder._routed_mlps = lambda: mlps  # type: ignore[method-assign]
    found, _ = layers.run(layers.decoder, _MIXES["some rows"], ((19, 51), (41,)))
    assert torch.equal(found, every[[19, 51, 52 + 41]])


@pytest.mark.parametrize("paused", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_it_pauses_for_the_mlps_of_a_caller(
    paused: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Layers("llama", torch.bfloat16)
    expected = layers.run(layers.decoder.run_by_layer, _MIXES["some rows"])
    mlps = {index: layers.base.mlps[f"model.layers.{index}.mlp"].run for index in paused}
    monkeypatch.setattr(layers.decoder, "_routed_mlps", lambda: mlps)
    monkeypatch.setattr(layers.decoder, "run_by_layer", _refuse)
    found = layers.run(layers.decoder, _MIXES["some rows"])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_adapters_change_what_the_native_call_makes() -> None:
    layers = Layers("llama", torch.float32)
    base, _ = layers.run(layers.decoder, None)
    mixed, _ = layers.run(layers.decoder, [0, -1, 1, -1])
    last = slice(-3, None)  # one row of each of the three decoding requests
    assert torch.equal(mixed[last][[0, 2]], base[last][[0, 2]])
    assert not torch.equal(mixed[last][1], base[last][1])


def test_norms_of_heads_go_operator_by_operator() -> None:
    layers = Layers("qwen3", torch.float32)
    expected = layers.run(layers.decoder.run_by_layer, [0, -1, 1, -1])
    found = layers.run(layers.decoder, [0, -1, 1, -1])
    assert torch.equal(found[0], expected[0])


def test_an_entry_beyond_the_tables_is_an_error() -> None:
    layers = Layers("llama", torch.float32)
    with pytest.raises(IndexError, match="an adapter slot beyond the tables"):
        layers.run(layers.decoder, [0, 9, 0, 0])
