"""Token → experts."""

from .arrow import arrow_prototypes, top_right_singular_vector
from .expansion import (
    Pairs,
    PlacedExperts,
    RoutedRows,
    expand,
    pair_rows,
    projection_segments,
    step_pairs,
)
from .gates import (
    NO_EXPERT,
    Routing,
    experts_per_row,
    gate_arrow,
    gate_dense,
    gate_switch,
    gate_top_k,
    gate_top_p,
    route,
)
from .load import ExpertLoad, LoadHistory, entropy, imbalance
from .mixlora_block import AddPlain, LoraOp, MlpBlock, MoeDown, MoeGateUp, mixed_mlp

__all__ = [
    "NO_EXPERT",
    "AddPlain",
    "ExpertLoad",
    "LoadHistory",
    "LoraOp",
    "MlpBlock",
    "MoeDown",
    "MoeGateUp",
    "Pairs",
    "PlacedExperts",
    "RoutedRows",
    "Routing",
    "arrow_prototypes",
    "entropy",
    "expand",
    "experts_per_row",
    "gate_arrow",
    "gate_dense",
    "gate_switch",
    "gate_top_k",
    "gate_top_p",
    "imbalance",
    "mixed_mlp",
    "pair_rows",
    "projection_segments",
    "route",
    "step_pairs",
    "top_right_singular_vector",
]
