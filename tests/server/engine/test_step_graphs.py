"""Steps laid into fixed tensors answer as free ones do. Recording itself needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, Family, NormPlan
from loraplex_server.engine import build
from loraplex_server.engine.graph_recorder import CudaRecorder
from loraplex_server.engine.layer_kind import LayerKind
from loraplex_server.engine.recorded_sizes import recorded_sizes
from loraplex_server.engine.sampling_params import SamplingParams
from tests.support.architectures import tiny_model
from tests.support.engines import Answer, generate_all, running_engine
from tests.support.rerun import Rerun, engine_with, replays
from tests.support.routed_plans import ATTENTION, lora_plan

PROMPTS = [[5, 9, 200, 31, 7], [17], list(range(40, 80)), [3, 3, 3], [250, 1, 2], [9, 8], [77] * 9]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def _plans(model: PreTrainedModel) -> list[AdapterPlan | None]:
    """Six adapters and the base, for as many prompts."""
    loras = [lora_plan(model, rank=rank, seed=rank) for rank in (2, 8, 17)]
    same = lora_plan(model, rank=4, seed=9, leaves=ATTENTION)
    return [loras[0], None, loras[1], same, loras[2], same, None]


def _tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_row_gets_what_it_gets_without_graphs(
    temperature: float, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=5)
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS, sampling, _plans(model))
    recorder = Rerun()
    with engine_with(recorder, model, monkeypatch) as engine:
        n_pieces = model.config.num_hidden_layers + 1
        sizes = [recorded_sizes(kind, 11, 128, n_pieces - 1) for kind in LayerKind]
        assert recorder.n_recorded == sum(len(d) + n_pieces * len(m) for d, m in sizes)
        for _ in range(2):  # the second time over KV that others have left
            assert _tokens(generate_all(engine, PROMPTS, sampling, _plans(model))) == _tokens(
                wanted
            )
        # Each prompt is computed in pieces, each further token in one: all steps are replayed.
        assert engine.stats().n_steps > 24
        assert replays(recorder, n_pieces) == engine.stats().n_steps


def test_short_and_long_requests_are_replayed_alike(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some steps hold requests of up to 16 positions alone, others longer ones, too."""
    monkeypatch.setattr("loraplex_server.engine.recorded_sizes.SHORT_POSITIONS", 16)
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    prompts, plans = PROMPTS[:2], _plans(model)[:2]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, prompts, sampling, plans)
    recorder = Rerun()
    with engine_with(recorder, model, monkeypatch) as engine:
        assert _tokens(generate_all(engine, prompts, sampling, plans)) == _tokens(wanted)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(recorder, n_pieces) == engine.stats().n_steps


def test_spare_rows_write_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows run in a step of four: the fourth may touch no page, not even the first."""
    recorder = Rerun()
    with engine_with(recorder, model, monkeypatch) as engine:
        for keys, values in zip(
            engine.loop.kv_cache.keys, engine.loop.kv_cache.values, strict=True
        ):
            assert not keys.any()  # nor did the recording at start
            assert not values.any()
        # Long enough that all three run before one ends. None takes a page after its first step:
        # it would be one that another has left.
        prompts = [[5], [17], list(range(40, 73))]
        generate_all(engine, prompts, SamplingParams(max_tokens=15, temperature=0.0))
        assert recorder.n_replayed > 0
        n_tokens = sum(len(prompt) + 14 for prompt in prompts)  # the last one is not computed
        for keys in engine.loop.kv_cache.keys:
            pages, heads, size, width = keys.shape
            unit = 16 // 4 // keys.element_size()  # [head_dim / unit, page, unit] in memory
            places = keys.view(pages, heads, width // unit, size, unit)
            assert int(places.ne(0).any(4).any(2).any(1).sum()) == n_tokens


def _own_ends(model: PreTrainedModel) -> dict[str, AdapterPlan]:
    """Adapters that change the embedding or the head."""
    hidden, vocab_size = model.config.hidden_size, model.config.vocab_size
    lora = lora_plan(model, rank=4, seed=1)
    return {
        "head rows": AdapterPlan(
            "1" * 64, lora.family, lora.modules, head_rows={7: torch.ones(hidden)}
        ),
        "embedding rows": AdapterPlan(
            "2" * 64, lora.family, lora.modules, embedding_rows={9: torch.ones(hidden)}
        ),
        "head": AdapterPlan(
            "3" * 64, lora.family, {}, replaced_weights={"lm_head": torch.randn(vocab_size, hidden)}
        ),
        "embedding": AdapterPlan(
            "4" * 64,
            lora.family,
            {},
            replaced_weights={"model.embed_tokens": torch.randn(vocab_size, hidden)},
        ),
    }


@pytest.mark.parametrize("part", ["head rows", "embedding rows", "head", "embedding"])
def test_own_embeddings_and_heads_run_around_what_is_recorded(
    part: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [_own_ends(model)[part], None, lora_plan(model, rank=4, seed=1)]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS[:3], plans=plans)
    recorder = Rerun()
    with engine_with(recorder, model, monkeypatch) as engine:
        assert _tokens(generate_all(engine, PROMPTS[:3], plans=plans)) == _tokens(wanted)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(recorder, n_pieces) == engine.stats().n_steps


def _odd(model: PreTrainedModel) -> AdapterPlan:
    """A norm of its own: no recorded layer has one."""
    width = model.config.hidden_size
    norms = {"model.layers.0.input_layernorm": NormPlan(torch.rand(width) + 0.5)}
    return AdapterPlan("5" * 64, Family.LN_TUNING, {}, norms=norms)


def test_an_odd_row_leaves_the_others_their_graph(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [None, _odd(model), lora_plan(model, rank=4, seed=1)]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS[:3], plans=plans)
    recorder = Rerun()
    with engine_with(recorder, model, monkeypatch) as engine:
        alone = generate_all(engine, PROMPTS[1:2], plans=plans[1:2])
        assert recorder.n_replayed == 0
        before = engine.stats().n_steps
        found = generate_all(engine, PROMPTS[:3], plans=plans)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(recorder, n_pieces) == engine.stats().n_steps - before
    assert _tokens(found) == _tokens(wanted)
    assert _tokens(alone) == _tokens(wanted[1:2])


def test_a_rank_larger_than_planned_for_is_served_and_nothing_is_recorded_anew(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Rerun()
    small, large = lora_plan(model, rank=4, seed=1), lora_plan(model, rank=100, seed=2)
    with running_engine(model, max_batch_size=11) as engine:
        wanted = [generate_all(engine, PROMPTS[:1], plans=[plan]) for plan in (large, small)]
    with engine_with(recorder, model, monkeypatch) as engine:
        generate_all(engine, PROMPTS[:1], plans=[small])
        at_start, replayed = recorder.n_recorded, recorder.n_replayed
        assert replayed > 0
        found = [generate_all(engine, PROMPTS[:1], plans=[plan]) for plan in (large, small)]
        assert (recorder.n_recorded, recorder.n_replayed) == (at_start, replayed)
        generate_all(engine, PROMPTS[:1])  # the base's steps are still replayed
        assert recorder.n_replayed > replayed
        assert recorder.n_recorded == at_start
    assert [_tokens(answers) for answers in found] == [_tokens(answers) for answers in wanted]
    assert caplog.text.count("start with --max-lora-rank of the largest rank") == 1


def test_a_rank_that_was_planned_for_is_replayed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, large = Rerun(), lora_plan(model, rank=100, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_recorder", lambda config, device: recorder)
        with running_engine(model, max_batch_size=11, max_lora_rank=100) as engine:
            generate_all(engine, PROMPTS[:1], plans=[large])
    assert recorder.n_replayed > 0


def test_where_recording_fails_steps_run_without(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING), engine_with(broken, model, monkeypatch) as engine:
        answers = generate_all(engine, PROMPTS, plans=_plans(model))
    with running_engine(model) as engine:
        assert _tokens(answers) == _tokens(generate_all(engine, PROMPTS, plans=_plans(model)))
    assert "run without CUDA graphs: operation not permitted" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_replay_gives_the_bits_of_a_free_step(model: PreTrainedModel) -> None:
    on_gpu = model.to("cuda", torch.bfloat16)
    answers = []
    for cuda_graphs, side in ((False, False), (False, True), (True, False), (True, True)):
        with running_engine(
            on_gpu, max_batch_size=11, cuda_graphs=cuda_graphs, lora_side_stream=side
        ) as engine:
            assert (engine.loop.runner._graphs is not None) is cuda_graphs
            answers.append(_tokens(generate_all(engine, PROMPTS, plans=_plans(model))))
    assert all(answer == answers[0] for answer in answers)
    assert CudaRecorder()(lambda: None) is not None
