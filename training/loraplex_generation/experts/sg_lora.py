"""SG-LoRA (arXiv 2509.10535): a CVAE with a learned prior over the mixture of near experts.

    c = {μ*, σ*²}   encoder q(z|X,c) and prior p(z|c): two-layer ReLU MLPs
    X̂ = D(z,c)      three-layer ReLU MLP
    loss = ‖X − X̂‖² + λ·KL(q(z|X,c) ‖ p(z|c)),   λ = 1;   inference: z ~ p(z|c*), or its mean

X are coordinates in the span of the experts (`expert.Span`), which keep the distances of the ΔW
that the paper flattens. Two choices are not in the paper: D adds to μ*, and in half of the training
samples the expert itself is no neighbour, so that c does not hold the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .neighbours import Neighbours, condition

Report = Callable[[float], None]  # gets the share of the steps that are done
_HIDDEN = 0.3  # share of the other experts that a training sample does not see


@dataclass(frozen=True, slots=True)
class SgRecipe:
    hidden: int = 256
    latent: int = 32
    kl: float = 1.0  # λ
    lr: float = 1e-3
    n_steps: int = 1000
    batch: int = 64
    seed: int = 0


class SgLora(nn.Module):
    """The model on points [n, size]."""

    def __init__(self, size: int, recipe: SgRecipe) -> None:
        super().__init__()
        hidden, latent = recipe.hidden, recipe.latent
        self.encoder = _mlp(3 * size, hidden, 2 * latent)
        self.prior = _mlp(2 * size, hidden, 2 * latent)
        self.decoder = _mlp(latent + 2 * size, hidden, hidden, size)
        for parameter in self.decoder[-1].parameters():  # starts as the mixture itself
            nn.init.zeros_(parameter)

    def forward(self, points: Tensor, mu: Tensor, var: Tensor) -> Tensor:
        """Return ‖X − X̂‖² and the KL of each sample, [2, n]."""
        c = _condition(mu, var)
        q_mean, q_log = _bounded(self.encoder(torch.cat([points, c], -1)))
        z = q_mean + (0.5 * q_log).exp() * torch.randn_like(q_mean)
        error = (self.decode(z, c, mu) - points).square().sum(-1)
        return torch.stack([error, gaussian_kl(q_mean, q_log, *_bounded(self.prior(c))).sum(-1)])

    @torch.inference_mode()
    def generate(self, mu: Tensor, var: Tensor, random: torch.Generator | None) -> Tensor:
        """Return points [n, size] from the prior's mean, or a draw if ``random`` is given."""
        c = _condition(mu, var)
        z, log = _bounded(self.prior(c))
        if random is not None:
            z = z + (0.5 * log).exp() * torch.randn(z.shape, generator=random)
        return self.decode(z, c, mu)

    def decode(self, z: Tensor, c: Tensor, mu: Tensor) -> Tensor:
        added: Tensor = self.decoder(torch.cat([z, c], -1))
        return mu + added


def fit_sg_lora(
    points: Tensor, similarities: Tensor, neighbours: Neighbours, recipe: SgRecipe, report: Report
) -> SgLora:
    """Train on experts: points [n, size], and cosines [n, n] of their descriptions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, n = SgLora(points.shape[1], recipe), len(points)
        optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        for step in range(recipe.n_steps):
            task = torch.randint(n, (recipe.batch,))
            own = torch.arange(n) == task[:, None]
            hide = (torch.rand(recipe.batch, n) < _HIDDEN) & ~own
            hide |= own & (torch.rand(recipe.batch, 1) < 0.5)
            hide[hide.all(1)] = own[hide.all(1)]
            mu, var = condition(neighbours.weights(similarities[task], hide), points)
            error, kl = model(points[task], mu, var).mean(1)
            optimiser.zero_grad()
            torch.autograd.backward(error + recipe.kl * kl)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            report((step + 1) / recipe.n_steps)
    return model.eval().requires_grad_(False)


def gaussian_kl(q_mean: Tensor, q_log: Tensor, p_mean: Tensor, p_log: Tensor) -> Tensor:
    """Return KL(q ‖ p) of diagonal Gaussians for each dimension."""
    return 0.5 * (p_log - q_log + (q_log.exp() + (q_mean - p_mean).square()) / p_log.exp() - 1)


def _condition(mu: Tensor, var: Tensor) -> Tensor:
    return torch.cat([mu, torch.log(var + 1e-4) / 4], -1)


def _bounded(both: Tensor) -> tuple[Tensor, Tensor]:
    """Split into mean and log-variance, and clamp the latter so that its exponential is finite."""
    mean, log = both.chunk(2, -1)
    return mean, log.clamp(-8.0, 8.0)


def _mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*parts[:-1])
