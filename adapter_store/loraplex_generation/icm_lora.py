"""ICM-LoRA: one convolutional CVAE over the adapters of all tasks, conditioned on a task vector.

    encoder  n × [Conv1d(k7, stride 2) BN LeakyReLU] → with the condition → mean, log-variance of z
    decoder  z and condition → n × [ConvTranspose1d(k7, stride 2) BN ELU], Conv1d
    loss     MSE + β·KL(q ‖ N(0, I))

Shipped: over the coordinates in the library's subspace. ICM_ON_RAW_WEIGHTS: over the flattened
weights with twelve convolutions, for the evaluation.

Against the published script, both are trained jointly over all tasks with a condition per sample,
scaled by statistics of the training library only, and the condition is the state of the bare base
(see task_vectors.py), never that of the target's own LoRA.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ICM_ON_RAW_WEIGHTS", "IcmLora", "IcmRecipe", "train_icm_lora"]


@dataclass(frozen=True, slots=True)
class IcmRecipe:
    latent: int = 32
    kl: float = 0.05  # β on the KL summed over z, against an MSE that is a mean over the vector
    lr: float = 1e-3
    n_steps: int = 1000
    batch: int = 64
    seed: int = 0
    channels: tuple[int, ...] = (8, 16, 32)


ICM_ON_RAW_WEIGHTS = IcmRecipe(
    latent=256, n_steps=240, batch=8, channels=(4, 8, 16, 32, 64, 64, 64, 64, 64, 32, 16, 8)
)
"""Far shorter than published: 240 steps, channels to 64 (256), β 0.05 (0.005), rate 1e-3 (2e-4)."""


class IcmLora(nn.Module):
    """Standardises vectors and conditions by the statistics of what it was trained on."""

    shift: Tensor
    scale: Tensor
    condition_shift: Tensor
    condition_scale: Tensor

    def __init__(self, size: int, width: int, recipe: IcmRecipe) -> None:
        """Of vectors [size], under conditions [width]."""
        super().__init__()
        channels = recipe.channels
        stride = 2 ** len(channels)
        self.size = size
        self._padded = -(-size // stride) * stride
        self._flat = (channels[-1], self._padded // stride)
        n_flat = self._flat[0] * self._flat[1]
        self.encoder = nn.Sequential(
            *[
                nn.Sequential(nn.Conv1d(a, b, 7, 2, 3), nn.BatchNorm1d(b), nn.LeakyReLU())
                for a, b in zip((1, *channels[:-1]), channels, strict=True)
            ],
            nn.Flatten(),
            nn.Linear(n_flat, recipe.latent),
        )
        self.to_z = nn.Linear(recipe.latent + width, 2 * recipe.latent)
        self.from_z = nn.Linear(recipe.latent + width, n_flat)
        back = channels[::-1]
        self.decoder = nn.Sequential(
            *[
                nn.Sequential(
                    nn.ConvTranspose1d(a, b, 7, 2, 3, output_padding=1), nn.BatchNorm1d(b), nn.ELU()
                )
                for a, b in zip(back, (*back[1:], back[-1]), strict=True)
            ],
            nn.Conv1d(back[-1], 1, 7, padding=3),
        )
        self.latent = recipe.latent
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("condition_shift", torch.zeros(width))
        self.register_buffer("condition_scale", torch.ones(width))

    def forward(self, vectors: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(MSE, mean KL) of raw vectors [n, size]."""
        x = (vectors - self.shift) / self.scale
        c = self._standard(condition)
        padded = nn.functional.pad(x, (0, self._padded - self.size))[:, None]
        mean, log = self.to_z(torch.cat([self.encoder(padded), c], -1)).chunk(2, -1)
        z = mean + (0.5 * log).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log.exp() - 1 - log).sum(-1).mean()
        return (self._decode(z, c) - x).square().mean(), kl

    @torch.inference_mode()
    def generate(self, condition: Tensor, generator: torch.Generator | None) -> Tensor:
        """Raw vectors [n, size]; z = 0, or a draw from N(0, I) if there is a `generator`."""
        z = torch.zeros(len(condition), self.latent)
        if generator is not None:
            z = torch.randn(z.shape, generator=generator)
        out: Tensor = self._decode(z, self._standard(condition)) * self.scale + self.shift
        return out

    def _standard(self, condition: Tensor) -> Tensor:
        return (condition - self.condition_shift) / self.condition_scale

    def _decode(self, z: Tensor, c: Tensor) -> Tensor:
        flat = self.from_z(torch.cat([z, c], -1)).view(-1, *self._flat)
        out: Tensor = self.decoder(flat)[:, 0, : self.size]
        return out


def train_icm_lora(
    samples: Tensor,
    conditions: Tensor,
    owner: Tensor,
    scale: Tensor,
    recipe: IcmRecipe,
    report: Callable[[str], None] = lambda _: None,
) -> IcmLora:
    """`samples` [n_tasks, n_snapshots, size]; `conditions` [n, width] with the task each is of.

    `scale` [size]: what the vectors are divided by once their mean is taken off.
    """
    torch.manual_seed(recipe.seed)
    model = IcmLora(samples.shape[-1], conditions.shape[-1], recipe)
    model.shift.copy_(samples.mean((0, 1)))
    model.scale.copy_(scale)
    model.condition_shift.copy_(conditions.mean(0))
    model.condition_scale.copy_(conditions.std(0).clamp_min(1e-6))
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * recipe.n_steps)
    errors: deque[float] = deque(maxlen=20)
    for step in range(1, recipe.n_steps + 1):
        asked = torch.randint(len(conditions), (recipe.batch,))
        which = torch.randint(samples.shape[1], (recipe.batch,))
        error, kl = model(samples[owner[asked], which], conditions[asked])
        optimiser.zero_grad()
        torch.autograd.backward(error + recipe.kl * kl)
        optimiser.step()
        schedule.step()
        errors.append(float(error.detach()))
        if step % (recipe.n_steps // 5 or 1) == 0:  # about 1 is what the mean would give
            mean = sum(errors) / len(errors)
            divergence = float(kl.detach())
            report(f"ICM-LoRA step {step}/{recipe.n_steps} error {mean:.3f}, KL {divergence:.2f}")
    return model.eval().requires_grad_(False)
