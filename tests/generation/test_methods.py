"""SG-LoRA's and ICM-LoRA's parts, each against its definition."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan
from loraplex_generation.errors import NotTrained, OutOfDistribution, UnfitExpert, UnfitPrompts
from loraplex_generation.experts.expert import (
    Expert,
    Factors,
    Span,
    fewest,
    gram_of,
    weighted_sum,
)
from loraplex_generation.experts.generator import Candidate, ExpertGenerator
from loraplex_generation.experts.icm_lora import IcmRecipe, fit_icm_lora, task_texts
from loraplex_generation.experts.neighbours import Neighbours, choose_neighbours, condition
from loraplex_generation.experts.sg_lora import SgLora, SgRecipe, fit_sg_lora, gaussian_kl
from loraplex_generation.request import AdapterGenerationRequest

PATHS = {"model.layers.0.q_proj": (6, 8), "model.layers.1.v_proj": (4, 8)}  # out, in


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expert(seed: int, *, rank: int = 2, name: str | None = None) -> Expert:
    factors = {
        path: Factors(_random(rank, n_in, seed=seed), _random(n_out, rank, seed=99 + seed))
        for path, (n_out, n_in) in PATHS.items()
    }
    return Expert(name or f"expert-{seed}", f"task {seed}", factors)


def _delta(expert: Expert) -> Tensor:
    return torch.cat([(b @ a).flatten() for a, b in expert.factors.values()])


def _one_hot(texts: list[str]) -> Tensor:
    """An encoder: the direction of the number in each text."""
    return torch.eye(10)[[int(text.split()[-1]) for text in texts]]


def test_the_condition_is_the_mean_and_variance_of_the_mixture() -> None:
    points, alpha = _random(3, 2), torch.tensor([[0.5, 0.3, 0.2]])
    mu, var = condition(alpha, points)
    which = torch.multinomial(alpha[0], 400_000, True, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mu[0], points[which].mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(var[0], points[which].var(0), atol=0.02, rtol=0.02)


def test_the_kl_is_that_of_diagonal_gaussians() -> None:
    q_mean, q_log, p_mean, p_log = (_random(4, 5, seed=s) for s in range(4))
    expected = kl_divergence(
        Normal(q_mean, (0.5 * q_log).exp()), Normal(p_mean, (0.5 * p_log).exp())
    )
    torch.testing.assert_close(gaussian_kl(q_mean, q_log, p_mean, p_log), expected)


def test_alpha_is_a_softmax_over_the_nearest_that_are_not_hidden() -> None:
    similarities = torch.tensor([[0.9, 0.8, 0.1, 0.7]])
    alpha = Neighbours(2, 0.1).weights(similarities)
    expected = torch.tensor([0.9, 0.8]).div(0.1).softmax(0)
    torch.testing.assert_close(alpha, torch.tensor([[*expected.tolist(), 0.0, 0.0]]))
    hide = torch.tensor([[True, False, False, False]])
    assert Neighbours(2, 0.1).weights(similarities, hide)[0].nonzero()[:, 0].tolist() == [1, 3]
    assert Neighbours(9, 0.1).weights(similarities).sum() == pytest.approx(1)


def test_neighbours_are_chosen_by_how_well_they_predict_a_task_left_out() -> None:
    embeddings = torch.nn.functional.normalize(_random(8, 4), dim=-1)
    twins = embeddings.repeat(2, 1)
    paired = choose_neighbours(twins @ twins.t(), _random(8, 3, seed=5).repeat(2, 1))
    assert paired.k == 1 or paired.tau == 0.02
    assert choose_neighbours(embeddings @ embeddings.t(), _random(8, 3, seed=9)).k > 1


def test_a_weighted_sum_is_the_sum_of_the_updates() -> None:
    experts, weights = [_expert(i) for i in range(3)], [0.5, -0.2, 0.7]
    config, tensors = weighted_sum(experts, weights, "tiny")
    assert config["r"] == config["lora_alpha"] == 6
    for path in PATHS:
        stem = f"base_model.model.{path}"
        made = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        parts = [e.factors[path].b @ e.factors[path].a for e in experts]
        expected = sum(w * part for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(made, expected)


def test_the_span_keeps_distances_and_gives_the_experts_back() -> None:
    experts = [_expert(i) for i in range(5)]
    deltas = torch.stack([_delta(expert) for expert in experts]).double()
    gram = gram_of(experts)
    torch.testing.assert_close(gram, deltas @ deltas.t(), atol=1e-3, rtol=1e-4)
    span = Span.of_gram(gram)
    torch.testing.assert_close(
        torch.stack([span.weights_of(point) for point in span.points]),
        torch.eye(5),
        atol=1e-4,
        rtol=0,
    )
    ratios = torch.pdist(span.points).double() / torch.pdist(deltas)
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), atol=0, rtol=1e-4)
    assert float(span.points.square().mean()) == pytest.approx(1, rel=1e-4)


def test_a_sum_of_fewer_experts_is_the_nearest_one() -> None:
    experts = [_expert(i) for i in range(4)]
    deltas = torch.stack([_delta(expert) for expert in experts]).double()
    weights = torch.tensor([0.5, 0.4, 0.09, 0.01])
    kept, fewer = fewest(weights, gram_of(experts), 2)
    assert kept == [0, 1]
    target = weights.double() @ deltas
    expected = torch.linalg.lstsq(deltas[kept].t(), target[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.tensor(fewer).double(), expected, atol=1e-4, rtol=1e-4)


def test_adapters_that_are_more_than_factors_are_no_experts() -> None:
    plain = ModulePlan(a=torch.zeros(2, 8), b=torch.zeros(6, 2))
    plan = AdapterPlan("00", Family.LORA, {"q": plain})
    assert Expert.of_plan("a", "text", plan).form == (("q", 6, 2, 8),)
    for other in (
        replace(plan, modules={"q": replace(plain, bias=torch.zeros(6))}),
        replace(plan, embedding_rows={3: torch.zeros(8)}),
        replace(plan, modules={"q": plain, "v": ModulePlan(torch.zeros(1, 8), torch.zeros(6, 1))}),
    ):
        with pytest.raises(UnfitExpert, match="'a'"):
            Expert.of_plan("a", "text", other)


def test_an_untrained_sg_lora_is_the_mixture_itself() -> None:
    model = SgLora(6, SgRecipe(hidden=8, latent=4)).eval()
    mu = _random(3, 6)
    torch.testing.assert_close(model.generate(mu, torch.ones(3, 6), None), mu)


def test_sg_lora_learns_what_the_mixture_misses_and_repeats_itself() -> None:
    """The experts are a nonlinear function of what near experts have in common."""
    angles = torch.linspace(0, 6, 24)
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    points = torch.stack([(3 * angles).sin(), (3 * angles).cos(), angles.cos()], 1)
    similarities, neighbours = embeddings @ embeddings.t(), Neighbours(4, 0.05)
    recipe = SgRecipe(hidden=64, latent=4, n_steps=400, batch=64, kl=0.1)
    first, again = (
        fit_sg_lora(points, similarities, neighbours, recipe, lambda share: None) for _ in range(2)
    )
    alpha = neighbours.weights(similarities, torch.eye(24, dtype=torch.bool))
    mu, var = condition(alpha, points)
    made = first.generate(mu, var, None)
    assert (made - points).square().mean() < 0.5 * (mu - points).square().mean()
    assert torch.equal(made, again.generate(mu, var, None))
    draws = [first.generate(mu, var, torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_icm_lora_reconstructs_experts_from_prompts_it_has_not_seen() -> None:
    points = _random(5, 6)
    centres = 3 * _random(5, 16, seed=1)
    states = [centre + 0.3 * _random(9, 16, seed=2 + i) for i, centre in enumerate(centres)]
    recipe = IcmRecipe(latent=4, n_steps=300, batch=16)
    model = fit_icm_lora(points, states, recipe, lambda share: None)
    fresh = torch.stack(
        [c + 0.3 * _random(8, 16, seed=50 + i).mean(0) for i, c in enumerate(centres)]
    )
    made = model.generate(fresh, None)
    assert (made - points).square().mean() < 0.1 * points.square().mean()
    assert (made - points.roll(1, 0)).square().mean() > points.square().mean()
    with pytest.raises(UnfitPrompts, match="at least 8 prompts, not 7"):
        task_texts("Sort it", ["x"] * 7)


def _candidate(expert: Expert) -> Candidate:
    return Candidate(expert.name, expert.description, lambda: expert)


def test_the_mixture_has_experts_of_the_form_of_the_nearest() -> None:
    experts = [_expert(0), _expert(1, rank=3), _expert(2)]
    encode = lambda texts: torch.nn.functional.normalize(  # noqa: E731
        _one_hot(texts) + 0.9 * torch.eye(10)[[0] * len(texts)], dim=-1
    )
    request = AdapterGenerationRequest("like 0", method="sg-lora")
    candidates = [*map(_candidate, experts)]
    made = ExpertGenerator("tiny").generate(request, candidates, None, encode)
    assert made.card["method"] == "sg-lora mixture"
    assert set(made.card["parts"]) == {"expert-0", "expert-2"}  # type: ignore[call-overload]
    assert made.config["r"] == 4


def test_requests_that_no_expert_is_near_are_refused() -> None:
    generator, expert = ExpertGenerator("tiny"), _candidate(_expert(1))
    request = AdapterGenerationRequest("like 2", method="sg-lora")
    with pytest.raises(OutOfDistribution):
        generator.generate(request, [expert], None, _one_hot)
    assert generator.generate(replace(request, force=True), [expert], None, _one_hot).tensors
    with pytest.raises(NotTrained, match="there are none"):
        generator.generate(request, [], None, _one_hot)
    with pytest.raises(NotTrained, match="loraplex generator train"):
        generator.generate(replace(request, method="icm-lora"), [expert], None, _one_hot)
    with pytest.raises(UnfitPrompts, match="no use for prompts"):
        generator.generate(replace(request, prompts=("x",) * 8), [expert], None, _one_hot)
