"""Steps laid into fixed tensors answer as free ones do. Recording itself needs a GPU."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, Family, NormPlan
from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.steps.captured_sizes import captured_sizes
from tests.support.adapters.routed_plans import ATTENTION, lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.rerun import Rerun, engine_with, replays
from tests.support.servers.engines import Answer, generate_all, running_engine

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
    temperature: float, model: PreTrainedModel
) -> None:
    sampling = SamplingParams(max_tokens=13, temperature=temperature, seed=5)
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS, sampling, _plans(model))
    capture = Rerun()
    with engine_with(capture, model) as engine:
        n_pieces = model.config.num_hidden_layers + 1
        sizes = [captured_sizes(kind, 11, 128, n_pieces - 1) for kind in LayerKind]
        assert capture.n_captured == sum(len(d) + n_pieces * len(m) for d, m in sizes)
        for _ in range(2):  # the second time over KV that others have left
            assert _tokens(generate_all(engine, PROMPTS, sampling, _plans(model))) == _tokens(
                wanted
            )
        # Each prompt is computed in pieces, each further token in one: all steps are replayed.
        assert engine.stats().n_steps > 24
        assert replays(capture, n_pieces) == engine.stats().n_steps


def test_short_and_long_requests_are_replayed_alike(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some steps hold requests of up to 16 positions alone, others longer ones, too."""
    monkeypatch.setattr("loraplex_server.engine.steps.captured_sizes.SHORT_POSITIONS", 16)
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    prompts, plans = PROMPTS[:2], _plans(model)[:2]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, prompts, sampling, plans)
    capture = Rerun()
    with engine_with(capture, model) as engine:
        assert _tokens(generate_all(engine, prompts, sampling, plans)) == _tokens(wanted)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(capture, n_pieces) == engine.stats().n_steps


def test_spare_rows_write_nothing(model: PreTrainedModel) -> None:
    """Three rows run in a step of four: the fourth may touch no page, not even the first."""
    capture = Rerun()
    with engine_with(capture, model) as engine:
        for keys, values in zip(
            engine.loop.kv_cache.keys, engine.loop.kv_cache.values, strict=True
        ):
            assert not keys.any()  # nor did the capture at start
            assert not values.any()
        # Long enough that all three run before one ends. None takes a page after its first step:
        # it would be one that another has left.
        prompts = [[5], [17], list(range(40, 73))]
        generate_all(engine, prompts, SamplingParams(max_tokens=15, temperature=0.0))
        assert capture.n_replayed > 0
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
    part: str, model: PreTrainedModel
) -> None:
    plans = [_own_ends(model)[part], None, lora_plan(model, rank=4, seed=1)]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS[:3], plans=plans)
    capture = Rerun()
    with engine_with(capture, model) as engine:
        assert _tokens(generate_all(engine, PROMPTS[:3], plans=plans)) == _tokens(wanted)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(capture, n_pieces) == engine.stats().n_steps


def _odd(model: PreTrainedModel) -> AdapterPlan:
    """A norm of its own: no captured layer has one."""
    width = model.config.hidden_size
    norms = {"model.layers.0.input_layernorm": NormPlan(torch.rand(width) + 0.5)}
    return AdapterPlan("5" * 64, Family.LN_TUNING, {}, norms=norms)


def test_an_odd_row_leaves_the_others_their_graph(model: PreTrainedModel) -> None:
    plans = [None, _odd(model), lora_plan(model, rank=4, seed=1)]
    with running_engine(model, max_batch_size=11) as engine:
        wanted = generate_all(engine, PROMPTS[:3], plans=plans)
    capture = Rerun()
    with engine_with(capture, model) as engine:
        alone = generate_all(engine, PROMPTS[1:2], plans=plans[1:2])
        assert capture.n_replayed == 0
        before = engine.stats().n_steps
        found = generate_all(engine, PROMPTS[:3], plans=plans)
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(capture, n_pieces) == engine.stats().n_steps - before
    assert _tokens(found) == _tokens(wanted)
    assert _tokens(alone) == _tokens(wanted[1:2])


def test_no_adapter_takes_the_graphs_of_others(model: PreTrainedModel) -> None:
    """Small, large and again small ranks are replayed, and nothing is recorded anew."""
    capture = Rerun()
    small, large = lora_plan(model, rank=4, seed=1), lora_plan(model, rank=128, seed=2)
    plans = (small, large, small, None)
    with running_engine(model, max_batch_size=11) as engine:
        wanted = [_tokens(generate_all(engine, PROMPTS[:1], plans=[plan])) for plan in plans]
    with engine_with(capture, model) as engine:
        at_start = capture.n_captured
        for plan, tokens in zip(plans, wanted, strict=True):
            assert _tokens(generate_all(engine, PROMPTS[:1], plans=[plan])) == tokens
        n_pieces = model.config.num_hidden_layers + 1
        assert replays(capture, n_pieces) == engine.stats().n_steps
        assert capture.n_captured == at_start


@pytest.mark.parametrize("broken", [set(LayerKind), {LayerKind.LORA}], ids=["all", "lora"])
def test_where_recording_fails_steps_run_without(
    broken: set[LayerKind], model: PreTrainedModel
) -> None:
    """Other kinds of layers keep their graphs: a bare row is replayed beside rows that are not."""
    capture = Rerun()

    def capture_some(work: Callable[[], None]) -> Callable[[], None]:
        kinds = [each for each in getattr(work, "args", ()) if isinstance(each, LayerKind)]
        if broken & set(kinds):
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(work)

    with engine_with(capture_some, model) as engine:
        assert [lost.layers for lost in engine.stats().lost_at_start] == [
            kind.name.lower() for kind in sorted(broken)
        ]
        answers = generate_all(engine, PROMPTS, plans=_plans(model))
        assert (capture.n_replayed > 0) == (LayerKind.BASE not in broken)
    with running_engine(model) as engine:
        assert _tokens(answers) == _tokens(generate_all(engine, PROMPTS, plans=_plans(model)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_replay_gives_the_bits_of_a_free_step(model: PreTrainedModel) -> None:
    """Batch sizes differ between the runs, so the products must not depend on them."""
    on_gpu = model.to("cuda", torch.bfloat16)
    answers = []
    for cuda_graphs in (False, True):
        options = {"cuda_graphs": cuda_graphs, "deterministic": True}
        with running_engine(on_gpu, max_batch_size=11, **options) as engine:
            assert (engine.loop.runner._graphs is not None) is cuda_graphs
            assert engine.stats().lost_at_start == ()
            answers.append(_tokens(generate_all(engine, PROMPTS, plans=_plans(model))))
    assert answers[0] == answers[1]
