"""The parts of the generators, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from adapter_store.benchmarks.evaluation.results import Evaluation, add_recovery, best_method
from adapter_store.benchmarks.evaluation.statistics import paired_difference, recovery
from loraplex_generation.analogy import analogy_matrix
from loraplex_generation.factors import Factors, train_factor_head
from loraplex_generation.icm_lora import ICM_ON_RAW_WEIGHTS, IcmLora, IcmRecipe, train_icm_lora
from loraplex_generation.library import Subspace
from loraplex_generation.regressors import fit_mlp, fit_ridge
from loraplex_generation.retrieval import Neighbours, choose_neighbours, condition
from loraplex_generation.row_adam import RowAdam
from loraplex_generation.sg_lora import SgLora, SgRecipe, gaussian_kl, train_sg_lora
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task
from tests.support.tiny_zoo import HashedWords

TASKS = [Task.parse(name) for name in load_split().sets["train"]]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_condition_is_the_mean_and_variance_of_the_mixture() -> None:
    means, variances = _random(3, 2), _random(3, 2, seed=1).square()
    alpha = torch.tensor([[0.5, 0.3, 0.2]])
    mu, var = condition(alpha, means, variances)
    which = torch.multinomial(alpha[0], 400_000, True, generator=torch.Generator().manual_seed(2))
    draws = means[which] + variances[which].sqrt() * _random(400_000, 2, seed=3)
    torch.testing.assert_close(mu[0], draws.mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(var[0], draws.var(0), atol=0.02, rtol=0.02)


def test_the_kl_is_that_of_diagonal_gaussians() -> None:
    q_mean, q_log, p_mean, p_log = (_random(4, 5, seed=s) for s in range(4))
    expected = kl_divergence(
        Normal(q_mean, (0.5 * q_log).exp()), Normal(p_mean, (0.5 * p_log).exp())
    )
    torch.testing.assert_close(gaussian_kl(q_mean, q_log, p_mean, p_log), expected)
    assert not gaussian_kl(q_mean, q_log, q_mean, q_log).any()


def test_hidden_experts_get_no_weight_and_the_rest_sum_to_one() -> None:
    embeddings = torch.nn.functional.normalize(_random(6, 8), dim=-1)
    neighbours = Neighbours(embeddings, k=3, tau=0.1)
    hide = torch.eye(6).bool()
    alpha = neighbours.weights(embeddings, hide=hide)
    assert not alpha[hide].any()
    torch.testing.assert_close(alpha.sum(1), torch.ones(6))
    assert ((alpha > 0).sum(1) == 3).all()
    assert neighbours.weights(embeddings, k=1).argmax(1).tolist() == list(range(6))


def test_neighbours_are_chosen_by_how_well_they_predict_a_task_left_out() -> None:
    embeddings = torch.nn.functional.normalize(_random(8, 4), dim=-1)
    noise_only = choose_neighbours(embeddings, embeddings, torch.arange(8), _random(8, 3, seed=9))
    twins = torch.cat([embeddings, torch.nn.functional.normalize(embeddings + 0.01, dim=-1)])
    points = _random(8, 3, seed=5).repeat(2, 1)
    paired = choose_neighbours(twins, twins, torch.arange(16), points)
    assert paired.k == 1 or paired.tau == 0.02
    assert noise_only.k > 1


def test_a_span_gives_its_experts_back_and_knows_the_weights_of_any_point() -> None:
    means = _random(7, 50)
    subspace = Subspace.of(means)
    t = subspace.project(means)
    weights = subspace.weights(t)
    torch.testing.assert_close(weights @ means, means, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(weights.sum(1), torch.ones(7), atol=1e-4, rtol=0)
    point = _random(subspace.size, seed=3)
    expected = subspace.mean + point @ subspace.directions
    torch.testing.assert_close(subspace.weights(point) @ means, expected, atol=1e-4, rtol=1e-3)


def test_an_untrained_sg_lora_is_the_weighted_average_itself() -> None:
    model = SgLora(6, 5, SgRecipe(hidden=8, latent=4)).eval()
    mu, var, text = _random(3, 6), torch.ones(3, 6), _random(3, 5)
    torch.testing.assert_close(model.generate(mu, var, text, None), mu)


def test_sg_lora_learns_what_the_average_misses_and_repeats_itself() -> None:
    embeddings = torch.nn.functional.normalize(_random(12, 6), dim=-1)
    points = embeddings @ _random(6, 5, seed=2)
    snapshots = points[:, None] + 0.02 * _random(12, 4, 5, seed=3)
    neighbours = Neighbours(embeddings, k=4, tau=0.3)
    recipe = SgRecipe(hidden=32, latent=4, n_steps=300, batch=32)
    first = train_sg_lora(snapshots, neighbours, embeddings, torch.arange(12), recipe)
    again = train_sg_lora(snapshots, neighbours, embeddings, torch.arange(12), recipe)
    mu, var = condition(
        neighbours.weights(embeddings, hide=torch.eye(12).bool()),
        snapshots.mean(1),
        snapshots.var(1, correction=0),
    )
    made = first.generate(mu, var, embeddings, None)
    assert (made - points).square().mean() < 0.3 * (mu - points).square().mean()
    assert torch.equal(made, again.generate(mu, var, embeddings, None))
    draw = first.generate(mu, var, embeddings, torch.Generator().manual_seed(7))
    assert torch.equal(draw, first.generate(mu, var, embeddings, torch.Generator().manual_seed(7)))
    assert not torch.equal(draw, made)


def test_icm_lora_reconstructs_tasks_from_their_condition() -> None:
    samples = _random(2, 1, 300).repeat(1, 4, 1) * torch.tensor([1.0, -1.0])[:, None, None]
    samples = samples + 0.01 * _random(2, 4, 300, seed=4)
    conditions = torch.eye(2)
    recipe = IcmRecipe(latent=8, n_steps=300, batch=8, channels=(4, 8, 4), lr=1e-2)
    scale = samples.flatten(0, 1).std(0)
    model = train_icm_lora(samples, conditions, torch.arange(2), scale, recipe)
    made = model.generate(conditions, None)
    error = (made - samples.mean(1)).square().mean()
    assert error < 0.5 * samples.mean(1).sub(samples.mean((0, 1))).square().mean()
    assert made.shape == (2, 300)


def test_icm_lora_has_the_published_shape() -> None:
    model = IcmLora(5000, 16, ICM_ON_RAW_WEIGHTS)
    assert len([m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv1d)]) == 12
    made = model.eval().generate(torch.zeros(1, 16), torch.Generator().manual_seed(0))
    assert made.shape == (1, 5000)


def test_ridge_and_mlp_recover_a_linear_map() -> None:
    x = _random(200, 10)
    owner = torch.arange(200)
    means = x @ _random(10, 4, seed=1) + 3
    ridge, mlp = fit_ridge(x, owner, means), fit_mlp(x, owner, means, seed=0)
    assert (ridge(x) - means).square().mean() < 0.01 * means.var()
    assert (mlp(x) - means).square().mean() < 0.2 * means.var()


def test_the_factor_head_reads_combinations_that_it_never_saw() -> None:
    encoder, factors = HashedWords(), Factors.of(TASKS)
    texts = [(wording, task) for task in TASKS for wording in task.descriptions()]
    labels = torch.tensor([factors.labels(task) for _, task in texts])
    encoded = encoder.encode([wording for wording, _ in texts])
    head = train_factor_head(encoded, labels, factors.groups, n_steps=300)
    held_out = [Task.parse(n) for n in load_split().sets["validation"][:5]]
    pairs = [(w, t) for t in held_out for w in t.descriptions()]
    read = head.distributions(encoder.encode([w for w, _ in pairs]))
    wanted = torch.tensor([factors.labels(t) for _, t in pairs])
    right = torch.stack([p.argmax(1) == wanted[:, i] for i, p in enumerate(read)])
    assert right.float().mean() > 0.75  # chance is below 0.2; MiniLM reads 98 %


def test_a_point_is_one_hot_where_the_factors_are_known() -> None:
    factors = Factors.of(TASKS)
    point = factors.exact_point(Task.parse("card.de/tag"))
    names = {factors.names[i] for i in point.nonzero()[:, 0].tolist()}
    assert names == {"mean", "card", "de", "tag", "card×de"}


def test_analogy_adds_a_language_and_a_format_that_never_met() -> None:
    languages, formats = ("de", "fr", "es"), ("plain", "json", "caps")
    tasks = [Task.parse(f"card.{n}/{f}") for n in languages for f in formats]
    known = [t for t in tasks if t.name != "card.fr/json"]
    language = {n: _random(40, seed=i) for i, n in enumerate(languages)}
    dressing = {f: _random(40, seed=10 + i) for i, f in enumerate(formats)}
    experts = torch.stack([language[t.language] + dressing[t.format] for t in known])
    factors = Factors.of(known)
    wanted = factors.exact_point(Task.parse("card.fr/json"))
    made = wanted @ analogy_matrix(factors, known) @ experts
    truth = language["fr"] + dressing["json"]
    assert (made - truth).norm() < 0.2 * truth.norm()


def test_row_adam_moves_only_the_rows_that_took_part() -> None:
    rows = torch.zeros(3, 4)
    adam = RowAdam(rows)
    for _ in range(3):
        adam.step(torch.ones(3, 4), torch.tensor([0, 2]), lr=0.1)
    assert not rows[1].any()
    torch.testing.assert_close(rows[0], torch.full((4,), -0.3), atol=1e-4, rtol=1e-3)


def test_the_bootstrap_is_paired_and_repeats_itself() -> None:
    a = [1.0, 2.0, 3.0, 4.0]
    gap = paired_difference([x + 0.5 for x in a], a, range(4))
    assert gap == pytest.approx((0.5, 0.5, 0.5))
    again = paired_difference(a, a[::-1], range(4))
    assert paired_difference(a, a[::-1], range(4)) == again


def test_recovery_is_zero_for_the_base_and_one_for_the_oracle() -> None:
    assert recovery(4.0, 4.0, 1.0) == 0
    assert recovery(4.0, 1.0, 1.0) == 1
    assert recovery(4.0, 5.0, 1.0) < 0


def test_one_hard_task_does_not_choose_the_method() -> None:
    nll = {  # of three tasks; the last is hard for all but one method, which is poor elsewhere
        "base": (4.0, 4.0, 5.0),
        "steady #0": (0.4, 0.4, 6.0),
        "steady #1": (0.5, 0.5, 6.0),
        "lucky": (2.2, 2.2, 2.0),
        "oracle": (0.0, 0.0, 0.0),
    }
    names = ("a", "b", "c")
    result = Evaluation(dict.fromkeys(names, "validation"))
    for arm, values in nll.items():
        result.scores[arm] = {n: {"nll": v} for n, v in zip(names, values, strict=True)}
    add_recovery(result)
    assert best_method(result, ("lucky", "steady", "absent")) == "steady"
    del result.scores["oracle"]
    add_recovery(result)
    assert best_method(result, ("lucky", "steady", "absent")) == "lucky"
