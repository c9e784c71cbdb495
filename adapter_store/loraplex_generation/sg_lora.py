"""SG-LoRA: a conditional VAE with a learned prior, over the condition {μ*, σ*²} of near experts.

    prior p(z|c), encoder q(z|t,c): two-layer ReLU MLPs;  decoder: three-layer ReLU MLP
    L = ‖t − D(z,c)‖² + λ·KL(q(z|t,c) ‖ p(z|c))

Shipped: t are coordinates in the subspace of the library, standardised, D adds to μ*, and the
condition also holds the description embedding, because {μ*, σ*²} of the neighbours alone does not
say which task is meant. SG_ON_RAW_WEIGHTS: t are the weights, and none of these changes.
In both, a task is left out of its own neighbours in training: else the condition is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .retrieval import Neighbours, condition

__all__ = ["SG_ON_RAW_WEIGHTS", "SgLora", "SgRecipe", "gaussian_kl", "train_sg_lora"]


@dataclass(frozen=True, slots=True)
class SgRecipe:
    hidden: int = 256
    latent: int = 32
    kl: float = 0.01  # λ
    free_bits: float = 0.05  # nats per latent dimension that cost nothing
    residual: bool = True  # the decoder adds to μ*
    text: bool = True  # the description's embedding is part of the condition
    lr: float = 1e-3
    n_steps: int = 1000
    batch: int = 128
    seed: int = 0


SG_ON_RAW_WEIGHTS = SgRecipe(
    hidden=64, latent=64, kl=1.0, free_bits=0.0, residual=False, text=False, n_steps=150, batch=32
)
"""λ = 1 as published; narrower and far shorter."""


class SgLora(nn.Module):
    """Works on standardised points; `scale` and `shift` are of the training library only."""

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int, width: int, recipe: SgRecipe) -> None:
        """`width` of the description's embedding."""
        super().__init__()
        hidden, latent = recipe.hidden, recipe.latent
        self.residual, self._text = recipe.residual, recipe.text
        n_condition = 2 * size + (width if recipe.text else 0)
        self.encoder = nn.Sequential(
            nn.Linear(size + n_condition, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.prior = nn.Sequential(
            nn.Linear(n_condition, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent + n_condition, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, size),
        )
        if recipe.residual:  # starts as the weighted average itself
            for parameter in self.decoder[-1].parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, t: Tensor, mu: Tensor, var: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction error [n], KL [n, latent]) on raw points."""
        x, c = self._standard(t), self._condition(mu, var, text)
        q_mean, q_log = _bounded(self.encoder(torch.cat([x, c], -1)))
        p_mean, p_log = _bounded(self.prior(c))
        z = q_mean + (0.5 * q_log).exp() * torch.randn_like(q_mean)
        error = (self._decode(z, c, mu) - x).square().mean(-1)
        return error, gaussian_kl(q_mean, q_log, p_mean, p_log)

    @torch.inference_mode()
    def generate(
        self, mu: Tensor, var: Tensor, text: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """t [n, size]; from the prior's mean if there is no `generator`, else a sample."""
        c = self._condition(mu, var, text)
        mean, log = _bounded(self.prior(c))
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator)
            mean = mean + (0.5 * log).exp() * noise
        out: Tensor = self._decode(mean, c, mu) * self.scale + self.shift
        return out

    def _standard(self, t: Tensor) -> Tensor:
        return (t - self.shift) / self.scale

    def _condition(self, mu: Tensor, var: Tensor, text: Tensor) -> Tensor:
        log = torch.log(var / self.scale.square() + 1e-4)
        parts = [self._standard(mu), log / 4]
        return torch.cat([*parts, text * text.shape[-1] ** 0.5] if self._text else parts, -1)

    def _decode(self, z: Tensor, c: Tensor, mu: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.cat([z, c], -1))
        return out + self._standard(mu) if self.residual else out


def _bounded(both: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, log-variance), the latter where its exponential is a number."""
    mean, log = both.chunk(2, -1)
    return mean, log.clamp(-8.0, 8.0)


def gaussian_kl(q_mean: Tensor, q_log: Tensor, p_mean: Tensor, p_log: Tensor) -> Tensor:
    """KL(q ‖ p) of diagonal Gaussians per dimension, from means and log-variances."""
    return 0.5 * (p_log - q_log + (q_log.exp() + (q_mean - p_mean).square()) / p_log.exp() - 1)


def train_sg_lora(
    snapshots: Tensor,
    neighbours: Neighbours,
    wordings: Tensor,
    owner: Tensor,
    recipe: SgRecipe,
) -> SgLora:
    """`snapshots` [n_tasks, n_snapshots, size]; `wordings` [n_texts, width] with their `owner`.

    Every batch pairs a snapshot of a task with a random wording of the same task.
    """
    torch.manual_seed(recipe.seed)
    means, variances = snapshots.mean(1), snapshots.var(1, correction=0)
    model = SgLora(snapshots.shape[-1], wordings.shape[-1], recipe)
    model.shift.copy_(means.mean(0))
    model.scale.copy_(means.std().expand_as(model.scale))  # one scale: directions keep their weight
    hide = torch.nn.functional.one_hot(owner, len(means)).bool()
    alpha = neighbours.weights(wordings, hide=hide)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    for _ in range(recipe.n_steps):
        text = torch.randint(len(wordings), (recipe.batch,))
        which = torch.randint(snapshots.shape[1], (recipe.batch,))
        mu, var = condition(alpha[text], means, variances)
        error, kl = model(snapshots[owner[text], which], mu, var, wordings[text])
        loss = error.mean() + recipe.kl * kl.mean(0).clamp_min(recipe.free_bits).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval().requires_grad_(False)
