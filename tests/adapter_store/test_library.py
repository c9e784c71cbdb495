"""Arrow: a library of plain LoRAs with gates from their own factors, against PEFT's layer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.composites.composite import library_digest, library_plan
from loraplex_adapter_store.errors import InvalidSelector, UnknownAdapter
from loraplex_adapter_store.names.selector import Library, NameRef, parse_selector
from loraplex_adapter_store.plan import AdapterPlan, RoutingStrategy
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_router.experts.gates import arrow_prototypes, route
from tests.support.adapters.lora_files import write_lora
from tests.support.adapters.plan_executor import plan_logits
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import GREEDY, generate_all, running_engine


def gate_of(factors: Sequence[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    return arrow_prototypes(factors, temperature=temperature)


@pytest.fixture(scope="module")
def base_spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "tiny/llama")


@pytest.fixture
def store(base_spec: BaseSpec, tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store", base_spec, engine=EngineHooks(gate_of=gate_of))
    for seed, name in enumerate("abc"):
        store.put_directory(name, write_lora(tmp_path / name, base_spec, seed=seed))
    yield store
    store.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_projection_does_what_pefts_arrow_layer_does() -> None:
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    torch.manual_seed(0)
    names, scales = ["one", "two", "three", "four"], {"one": 2.0, "two": 0.5, "three": 1.0}
    scales["four"] = 1.5
    a = {n: nn.Linear(12, 4, bias=False) for n in names}
    b = {n: nn.Linear(4, 9, bias=False) for n in names}
    for n in names:  # one strong direction each: PEFT iterates only 15 times towards it
        a[n].weight.data[0] *= 6
        b[n].weight.data[:, 0] *= 6
    config = SimpleNamespace(
        top_k=2,
        router_temperature=0.7,
        rng_seed=1,
        task_adapter_names=names,
        gks_adapter_names=[],
        use_gks=False,
    )
    layer = ArrowLoraLinearLayer(12, config)
    x = torch.randn(1, 7, 12)
    with torch.no_grad():
        layer.build_prototypes(a, b)
        want = layer(x, a, b, nn.Identity(), scales)[0]
        # The store folds each scale into b; the direction of a prototype does not change.
        factors = [(b[n].weight * scales[n], a[n].weight) for n in names]
        gate = gate_of(factors, 0.7)
        routing = route(x[0], gate, RoutingStrategy.ARROW, top_k=2, top_p=0.0)
        got = torch.zeros(7, 9)
        for row in range(7):
            for e, w in zip(routing.expert_index[row].tolist(), routing.weight[row], strict=True):
                got[row] += w * (factors[e][0] @ (factors[e][1] @ x[0, row]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_library_is_leased_like_any_adapter_and_shares_its_plan(store: AdapterStore) -> None:
    selector = parse_selector({"arrow": ["a", "b", "c"], "top_k": 2})
    with store.acquire(selector) as first, store.acquire(selector) as second:
        assert first.plan is second.plan
        assert first.name == "arrow(a, b, c; 2)"
        block = next(iter(first.plan.experts.values()))
        assert len(block.experts) == 3
        assert block.top_k == 2
    assert store.stats().n_leases == 0


def test_the_order_of_members_does_not_change_the_digest(store: AdapterStore) -> None:
    with (
        store.acquire(Library((NameRef("a"), NameRef("b")), 1)) as first,
        store.acquire(Library((NameRef("b"), NameRef("a")), 1)) as second,
        store.acquire(Library((NameRef("a"), NameRef("b")), 2)) as other,
    ):
        assert first.digest == second.digest
        assert first.digest != other.digest


def test_a_library_with_an_unknown_member_is_refused_and_holds_nothing(
    store: AdapterStore,
) -> None:
    with pytest.raises(UnknownAdapter):
        store.acquire(Library((NameRef("a"), NameRef("nobody")), 1))
    assert store.stats().n_leases == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"arrow": ["a"]}, "2 to 16"),
        ({"arrow": "a,b"}, "2 to 16"),
        ({"arrow": ["a", "a"]}, "twice"),
        ({"arrow": ["a", "b"], "top_k": 3}, "1 to 2"),
        ({"arrow": ["a", "b"], "temperature": 0}, "0.001"),
        ({"arrow": ["a", "b"], "gate": 1}, "unknown keys"),
    ],
)
def test_a_malformed_library_is_refused_with_the_rule(value: object, words: str) -> None:
    with pytest.raises(InvalidSelector, match=words):
        parse_selector(value)


def test_members_beyond_low_rank_are_refused() -> None:
    plain = lora_plan(tiny_model(), rank=2, seed=1)
    name = next(iter(plain.modules))
    shifted = replace(plain.modules[name], bias=torch.ones(1))
    biased = replace(plain, digest="b" * 64, modules={**plain.modules, name: shifted})
    with pytest.raises(InvalidSelector, match="more than low-rank"):
        library_plan([plain, biased], "0" * 64, 1, 1.0, gate_of, ["plain", "biased"])


def test_without_gates_a_store_says_so(base_spec: BaseSpec, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "plain", base_spec)
    with pytest.raises(InvalidSelector, match="no gates"):
        store.acquire(Library((NameRef("a"), NameRef("b")), 1))
    store.close()


def test_the_engine_serves_a_library_beside_its_members_exactly() -> None:
    model = tiny_model()
    members: list[AdapterPlan] = [
        lora_plan(model, rank=r, seed=s) for s, r in ((1, 2), (2, 7), (3, 20))
    ]
    members.append(lora_plan(model, rank=3, seed=4, leaves=["q_proj", "up_proj"]))
    digest = library_digest([m.digest for m in members], 2, 1.0)
    library = library_plan(members, digest, 2, 1.0, gate_of, list("abcd"))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(300, (n,), generator=generator).tolist() for n in (9, 5, 14, 7)]
    plans = [library, members[0], None, library]
    with running_engine(model, max_loras=64) as engine:
        answers = generate_all(engine, prompts, replace(GREEDY, max_tokens=6), plans)
    for prompt, plan, answer in zip(prompts, plans, answers, strict=True):
        if plan is library:
            tokens = prompt + answer.token_ids
            want = plan_logits(model, library, torch.tensor([tokens]))[0]
            assert answer.token_ids == want[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
