"""ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws (Huang and Balestriero 2024, arXiv
2410.09692).

No dropout, no scale (s = 1), and a learning rate for each row of B that falls with its length, so
that B leaves zero quickly:

    step of row i  ×  1 / √(‖B_i‖ + 1/η²)

η is the multiplier of a row of zeros; 10 here. The paper scales gradients, which Adam would undo,
so the steps are scaled. Weight decay is scaled with them.
"""

from loraplex_training.engine.adapter import Adam

from .recipe import Recipe, RecipeAdapter

_ETA = 10.0


def _optimiser(adapter: RecipeAdapter, adam: Adam) -> float:
    before = {name: part["B"].detach().clone() for name, part in adapter.parts.items()}
    norm = adapter.adam_step(adam)
    for name, part in adapter.parts.items():
        b, old = part["B"].data, before[name]
        share = (old.norm(dim=1, keepdim=True) + 1 / _ETA**2).rsqrt()
        b.copy_(old + share * (b - old))
    return norm


RECIPE = Recipe(optimiser=_optimiser, scale=1.0)
