"""ICM-LoRA (arXiv 2501.17635): one convolutional CVAE over all experts, given a task vector.

    encoder  n × [Conv1d(k7, stride 2) BN LeakyReLU] → with the condition → mean, log-variance of z
    decoder  z and condition → n × [ConvTranspose1d(k7, stride 2) BN ELU], Conv1d
    loss = MSE + β·KL(q(z|X,c) ‖ N(0, I));   generation: z ~ N(0, I), or z = 0

The condition is a task vector: the mean over unlabelled prompts of the bare base's last hidden
state at the last token. The description leads each prompt, because tasks may share their inputs.
As the abstract says, one model learns from all tasks; the published script trains one for each
task, on states of the target's own LoRA. The convolutions decode coordinates in the span of the
experts (`expert.Span`) in place of raw weights, so that a fit takes seconds on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loraplex_generation.errors import UnfitPrompts

from .sg_lora import Report

MIN_PROMPTS = 8  # fewer say more about themselves than about the task
MAX_PROMPTS = 30  # of an expert, as in the paper


@dataclass(frozen=True, slots=True)
class IcmRecipe:
    latent: int = 32
    kl: float = 0.05  # β on the KL summed over z, against an MSE that is a mean over the vector
    lr: float = 1e-3
    n_steps: int = 1000
    batch: int = 32
    seed: int = 0
    channels: tuple[int, ...] = (8, 16, 32)


def task_texts(description: str, prompts: Sequence[str]) -> list[str]:
    """Return the user messages whose last states make a task vector.

    Raises UnfitPrompts for one to seven prompts.
    """
    if 0 < len(prompts) < MIN_PROMPTS:
        raise UnfitPrompts(
            f"a task is read off at least {MIN_PROMPTS} prompts, not {len(prompts)}; "
            "give more, or give none, and the description alone is read"
        )
    return [f"{description}\n{prompt}" for prompt in prompts] or [description]


class IcmLora(nn.Module):
    """The model on points [n, size] and task vectors [n, width]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int, width: int, recipe: IcmRecipe) -> None:
        super().__init__()
        channels, latent = recipe.channels, recipe.latent
        self.size, self.latent = size, latent
        self.padded = -(-size // 2 ** len(channels)) * 2 ** len(channels)
        self.flat = (channels[-1], self.padded // 2 ** len(channels))
        n_flat = self.flat[0] * self.flat[1]
        back = channels[::-1]
        self.encoder = nn.Sequential(
            *[
                nn.Sequential(nn.Conv1d(a, b, 7, 2, 3), nn.BatchNorm1d(b), nn.LeakyReLU())
                for a, b in zip((1, *channels[:-1]), channels, strict=True)
            ],
            nn.Flatten(),
            nn.Linear(n_flat, latent),
        )
        self.to_z = nn.Linear(latent + width, 2 * latent)
        self.from_z = nn.Linear(latent + width, n_flat)
        self.decoder = nn.Sequential(
            *[
                nn.Sequential(
                    nn.ConvTranspose1d(a, b, 7, 2, 3, output_padding=1), nn.BatchNorm1d(b), nn.ELU()
                )
                for a, b in zip(back, (*back[1:], back[-1]), strict=True)
            ],
            nn.Conv1d(back[-1], 1, 7, padding=3),
        )
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, points: Tensor, tasks: Tensor) -> Tensor:
        """Return the MSE and the KL, [2]."""
        c = self.standard(tasks)
        padded = pad(points, (0, self.padded - self.size))[:, None]
        mean, log = self.to_z(torch.cat([self.encoder(padded), c], -1)).chunk(2, -1)
        z = mean + (0.5 * log).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log.exp() - 1 - log).sum(-1).mean()
        return torch.stack([(self.decode(z, c) - points).square().mean(), kl])

    @torch.inference_mode()
    def generate(self, tasks: Tensor, random: torch.Generator | None) -> Tensor:
        """Return points [n, size] from z = 0, or from a draw of z if ``random`` is given."""
        z = torch.zeros(len(tasks), self.latent)
        if random is not None:
            z = torch.randn(z.shape, generator=random)
        return self.decode(z, self.standard(tasks))

    def standard(self, tasks: Tensor) -> Tensor:
        return (tasks - self.shift) / self.scale

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        flat = self.from_z(torch.cat([z, c], -1)).view(-1, *self.flat)
        out: Tensor = self.decoder(flat)[:, 0, : self.size]
        return out


def fit_icm_lora(
    points: Tensor, states: Sequence[Tensor], recipe: IcmRecipe, report: Report
) -> IcmLora:
    """Train on experts: points [n, size], and for each the states [n_texts, width] of its texts.

    The first state is the description's alone. A sample's task vector is that state, or the mean of
    a random half of the others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        every = torch.cat(list(states))
        model = IcmLora(points.shape[1], every.shape[1], recipe)
        model.shift.copy_(every.mean(0))
        model.scale.copy_(every.std(0).clamp_min(1e-6))
        optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * recipe.n_steps)
        for step in range(recipe.n_steps):
            task = torch.randint(len(points), (recipe.batch,))
            vectors = torch.stack([_task_vector(states[i]) for i in task.tolist()])
            error, kl = model(points[task], vectors)
            optimiser.zero_grad()
            torch.autograd.backward(error + recipe.kl * kl)
            optimiser.step()
            schedule.step()
            report((step + 1) / recipe.n_steps)
    return model.eval().requires_grad_(False)


def _task_vector(states: Tensor) -> Tensor:
    n = len(states) - 1
    if n == 0 or float(torch.rand(())) < 0.25:
        return states[0]
    return states[1 + torch.randperm(n)[: (n + 1) // 2]].mean(0)
