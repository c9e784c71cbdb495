"""Methods that PEFT does not have, each against its published formula in plain torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from tests.conformance.oracle import Forward
from tests.conformance.own_row import FormulaAdapter, OwnRow, Random, low_rank_sum

_PREFIX = "base_model.model."
_Q, _UP, _DOWN = (
    "model.layers.3.self_attn.q_proj",
    "model.layers.5.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
)
_MODULES = (_Q, _UP, _DOWN)
_STD = 0.06  # of the factors; three modules of thirty layers, too, must change the answer

_Module = Callable[[str, Tensor, Random], tuple[dict[str, Tensor], Forward]]


def _config(**values: object) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(_MODULES),
        **values,
    }


def _weight(base: PreTrainedModel, name: str) -> Tensor:
    weight: Tensor = base.get_submodule(name).weight.detach()
    return weight


def _by_module(
    module: _Module, prefix: str = _PREFIX, **config: object
) -> Callable[[PreTrainedModel, Random], FormulaAdapter]:
    """Build an adapter from a function of (name, W [out, in], draws)."""

    def build(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
        tensors: dict[str, Tensor] = {}
        forwards: dict[str, Forward] = {}
        for name in _MODULES:
            parts, forwards[name] = module(name, _weight(base, name), randn)
            path = f"{prefix}{name.removeprefix('model.') if 'language_model' in prefix else name}"
            tensors |= {
                f"{path}{'' if part.startswith('_') else '.'}{part}": tensor
                for part, tensor in parts.items()
            }
        return FormulaAdapter(_config(**config), tensors, forwards)

    return build


def _factors(weight: Tensor, randn: Random, rank: int = 4) -> tuple[Tensor, Tensor]:
    n_out, n_in = weight.shape
    return randn(rank, n_in, std=_STD), randn(n_out, rank, std=_STD)


def _core(core_name: str) -> _Module:
    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        a, b = _factors(weight, randn)
        core = randn(4, 4, std=0.7)
        parts = {"lora_A.weight": a, "lora_B.weight": b, core_name: core}
        return parts, low_rank_sum(6 / 4, a, core, b)

    return module


def _latent(*, of_gradient: bool, spelled: str = "_lora_latent_mapping.weight") -> _Module:
    """LoRA-XS and LoRA-SB: frozen factors from an SVD, a trained core, saved by old or new PEFT.

    Their script decomposes Wᵀ, or the first step −η sign(∇), and gives A the singular values.
    """

    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        start = -1e-3 * randn(*weight.shape, std=1.0).sign() if of_gradient else weight
        u, sigma, vh = torch.linalg.svd(start.t(), full_matrices=False)
        a, b = (u[:, :4] * sigma[:4]).t().contiguous(), vh[:4].t().contiguous()
        core = randn(4, 4, std=10.0 if of_gradient else 0.1)
        parts = {"lora_A.weight": a, "lora_B.weight": b, spelled: core}
        return parts, low_rank_sum(6 / 4, a, core, b)

    return module


def _plain(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    a, b = _factors(weight, randn)
    return {"lora_A.weight": a, "lora_B.weight": b}, low_rank_sum(6 / 4, a, b)


def _loraga_authors(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    """``save_loraga_model_final`` of the authors' fork: the start is appended, r and α doubled."""
    (a, b), (a0, b0) = _factors(weight, randn), _factors(weight, randn)
    frozen = weight - 6 / 4 * b0 @ a0
    parts = {"lora_A.weight": torch.cat([a, a0]), "lora_B.weight": torch.cat([b, -b0], dim=1)}
    return parts, lambda _, x: F.linear(x, frozen) + 6 / 4 * F.linear(F.linear(x, a), b)


def _kasa_authors(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    """The fork keeps the in − r largest singular values: all of them where in exceeds out."""
    a, b = _factors(weight, randn)
    diag = randn(4, std=1.0)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    n_kept = weight.shape[1] - 4
    frozen = u[:, :n_kept] * sigma[:n_kept] @ vh[:n_kept]
    parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_diag": diag}
    return parts, lambda _, x: F.linear(x, frozen) + 6 / 4 * F.linear(F.linear(x, a) * diag, b)


def _pissa_residual(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    """PiSSA's and BA-LoRA's scripts: the residual was the base, the config says nothing of it."""
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:4] * 4 / 6).sqrt()
    a, b = root.unsqueeze(1) * vh[:4], u[:, :4] * root
    a, b = a + randn(*a.shape, std=0.02), b + randn(*b.shape, std=0.02)
    return {"lora_A.weight": a, "lora_B.weight": b}, low_rank_sum(6 / 4, a, b)


def _randlora_authors(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
    """The authors' fork of PEFT: shared bases of the widest layer, scaled by α / (r √N)."""
    rank, alpha = 64, 128
    widths = [_weight(base, name).shape for name in _MODULES]
    n_out, n_in = max(shape[0] for shape in widths), max(shape[1] for shape in widths)
    first = randn(rank, 1, n_out, std=1.0)
    second = randn(n_in, math.ceil(min(n_out, n_in) / rank), rank, std=1.0)
    tensors = {"base_model.randbasis_A": first, "base_model.randbasis_B": second}
    forwards: dict[str, Forward] = {}
    for name in _MODULES:
        out_features, in_features = _weight(base, name).shape
        small, large = sorted((out_features, in_features))
        n = math.ceil(small / rank)
        lambdas, gammas = randn(rank, n, std=0.004), 1 / large + randn(n, small, std=0.01)
        tensors[f"{_PREFIX}{name}.randlora_lambda"] = lambdas
        tensors[f"{_PREFIX}{name}.randlora_gamma"] = gammas
        scaled = (lambdas[:, :, None] * first[:, :, :small] * gammas[None]).flatten(end_dim=1)
        delta = second[:large, :n].flatten(1) @ scaled * (alpha / rank / math.sqrt(n))
        delta = delta if small == in_features else delta.t()
        forwards[name] = lambda module, x, delta=delta: F.linear(x, module.weight + delta)
    config = {"peft_type": "RANDLORA", "r": rank, "randlora_alpha": alpha, "sparse": False}
    config |= {"projection_prng_key": 8539, "save_projection": True, "use_dora": False}
    return FormulaAdapter({**config, "target_modules": list(_MODULES)}, tensors, forwards)


_RANKS = {_Q: 2, _UP: 6, _DOWN: 3}


def _core_of_own_rank(
    name: str, weight: Tensor, randn: Random
) -> tuple[dict[str, Tensor], Forward]:
    rank = _RANKS[name]
    a, b = _factors(weight, randn, rank)
    core = randn(rank, rank, std=0.7)
    parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_S.weight": core}
    return parts, low_rank_sum(6 / rank, a, core, b)


def _with_start(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    """W₀ = W − s B₀ A₀ was frozen in training."""
    (a, b), (a0, b0) = _factors(weight, randn), _factors(weight, randn)
    parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_A0.weight": a0, "lora_B0.weight": b0}
    frozen = weight - 6 / 4 * b0 @ a0
    return parts, lambda _, x: F.linear(x, frozen) + 6 / 4 * F.linear(F.linear(x, a), b)


def _nystrom(base_residual: bool, alpha: int = 6) -> _Module:
    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        a, b = _factors(weight, randn)
        core = randn(4, 4, std=0.7)
        frozen = weight
        if base_residual:
            start = weight[:, :4] @ torch.linalg.pinv(weight[:4, :4]) @ weight[:4]
            frozen = weight - alpha / 4 * start
        parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_N.weight": core}
        return (
            parts,
            lambda _, x: (
                F.linear(x, frozen) + alpha / 4 * F.linear(F.linear(F.linear(x, a), core), b)
            ),
        )

    return module


def _comp_lora(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    """ΔW = s B A (I − VᵀV) with V the first right singular vectors of W."""
    v = torch.linalg.svd(weight, full_matrices=False)[2][:5]
    a, b = _factors(weight, randn)
    parts = {"lora_A.weight": a, "lora_B.weight": b, "comp_projector.weight": v}
    return parts, low_rank_sum(6 / 4, torch.eye(weight.shape[1]) - v.t() @ v, a, b)


def _sora(a_name: str, b_name: str, gate_name: str) -> _Module:
    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        a, b = _factors(weight, randn, 8)
        gate = randn(1, 8, std=1.0)
        gate[0, [1, 2, 5]] = 0
        parts = {a_name: a, b_name: b, gate_name: gate}
        return (
            parts,
            lambda module, x: F.linear(x, module.weight) + ((x @ a.T) * gate) @ b.T * (6 / 8),
        )

    return module


def _loldu(method: str, *, z_alone: bool = False) -> _Module:
    """W = P L D U; training replaces σ₀ z₀ by σ z between P L_r and U_r.

    Saved as a state dict of the parametrised model, or as ``get_loldu_state_dict`` does: z alone.
    """
    rank, alpha = 6, 1

    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        p, lower, upper = torch.linalg.lu(weight)
        d = torch.diagonal(upper)
        unit = (upper[: d.numel()] / d.unsqueeze(1))[:rank]
        start = {"lu": d[:rank], "constant": d[:rank].mean().expand(rank)}.get(method)
        drawn = randn(rank, std=0.3)
        start = drawn if start is None else start
        z = d[:rank] + randn(rank, std=1.0 if z_alone else 0.3)
        sigma = torch.tensor(alpha / rank if z_alone else 0.4)
        frozen = weight - alpha / rank * p @ lower[:, :rank] @ torch.diag(start) @ unit
        trained = frozen + sigma * p @ lower[:, :rank] @ torch.diag(z) @ unit
        at = "parametrizations.weight"
        parts = {f"{at}.0.vector_z": z, f"{at}.0.scaling_factor": sigma}
        parts |= {f"{at}.original": frozen, f"{at}.0.layer_weights": frozen.clone(), f"{at}.0.P": p}
        parts |= {f"{at}.0.lora_A": unit, f"{at}.0.lora_B": lower[:, :rank]}
        parts[f"{at}.0.lora_dropout_mask"] = torch.ones(1, weight.shape[1])
        if z_alone:
            parts = {f"{at}.0.vector_z": z}
        if method == "uniform":
            parts[f"{at}.0.vector_z0"] = start
        return parts, lambda _, x: F.linear(x, trained)

    return module


def _block_lora(axis: str, n_blocks: int, rslora: bool) -> _Module:
    rank, alpha = 8, 12
    scale = alpha / (math.sqrt(rank) if rslora else rank)

    def module(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
        n_out, n_in = weight.shape
        if axis == "rank":  # every block of A is one shared matrix
            a = randn(rank // n_blocks, n_in, std=_STD)
            arms = randn(n_blocks, n_out, rank // n_blocks, std=_STD)
            parts = {"block_lora_A.weight": a, "block_lora_B.weight": arms}
            return (
                parts,
                lambda module, x: (
                    F.linear(x, module.weight)
                    + scale * sum(F.linear(F.linear(x, a), arm) for arm in arms)
                ),
            )
        a, b = randn(rank, n_in // n_blocks, std=_STD), randn(n_out, rank, std=_STD)
        parts = {"block_lora_A.weight": a, "block_lora_B.weight": b}
        return (
            parts,
            lambda module, x: (
                F.linear(x, module.weight)
                + scale * F.linear(sum(F.linear(part, a) for part in x.chunk(n_blocks, -1)), b)
            ),
        )

    return module


def _abmll(_: str, weight: Tensor, randn: Random) -> tuple[dict[str, Tensor], Forward]:
    a, b = _factors(weight, randn)
    parts = {
        "lora_A.weight": a,
        "lora_B.weight": b,
        "lora_A.log_std": torch.full(a.shape, -3.0),
        "lora_B.log_std": torch.full(b.shape, -3.0),
    }
    return parts, low_rank_sum(6 / 4, a, b)


def _lofit(*, scaled: bool) -> Callable[[PreTrainedModel, Random], FormulaAdapter]:
    """Chosen heads: h ← (1 + a) ⊙ h + v in front of o_proj."""

    def build(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
        n_heads, head_dim = base.config.num_attention_heads, base.config.head_dim
        tensors: dict[str, Tensor] = {}
        forwards: dict[str, Forward] = {}
        for layer, heads in ((2, (1, 3)), (4, (0, 4, 8))):
            attention = f"model.layers.{layer}.self_attn"
            offset, scale = torch.zeros(n_heads, head_dim), torch.zeros(n_heads, head_dim)
            for head in heads:
                offset[head] = tensors[f"{attention}.attn_v.{head}"] = randn(head_dim, std=0.2)
                if scaled:
                    scale[head] = tensors[f"{attention}.attn_A.{head}"] = randn(head_dim, std=0.5)
            forwards[f"{attention}.o_proj"] = lambda module, x, offset=offset, scale=scale: (
                F.linear((1 + scale.flatten()) * x + offset.flatten(), module.weight)
            )
        return FormulaAdapter({"peft_type": "LOFIT"}, tensors, forwards)

    return build


def _full(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
    """A fine-tune whose linears moved by rank 3, with norms and rows of the tied embedding."""
    tensors: dict[str, Tensor] = {}
    forwards: dict[str, Forward] = {}
    for name in _MODULES:
        weight = _weight(base, name)
        a, b = _factors(weight, randn, 3)
        tensors[f"{name}.weight"] = weight + b @ a
        forwards[name] = lambda _, x, trained=tensors[f"{name}.weight"]: F.linear(x, trained)
    for name in ("model.layers.2.input_layernorm", "model.layers.4.post_attention_layernorm"):
        norm = _weight(base, name)
        tensors[f"{name}.weight"] = norm * (1 + randn(*norm.shape, std=0.1))
        forwards[name] = lambda module, x, trained=tensors[f"{name}.weight"]: F.rms_norm(
            x, x.shape[-1:], trained, module.variance_epsilon
        )
    return FormulaAdapter({"peft_type": "FULL"}, tensors, forwards)


def _full_rows(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
    rows = _weight(base, "model.embed_tokens").clone()
    rows[[504, 253, 2067]] += randn(3, rows.shape[1], std=0.05)
    forwards: dict[str, Forward] = {
        "model.embed_tokens": lambda _, ids: F.embedding(ids, rows),
        "lm_head": lambda _, x: F.linear(x, rows),  # tied
    }
    return FormulaAdapter({"peft_type": "FULL"}, {"model.embed_tokens.weight": rows}, forwards)


def _full_final_norm(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
    weight = _weight(base, "model.norm")
    trained = weight * (1 + randn(*weight.shape, std=0.1))

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], trained, module.variance_epsilon)

    return FormulaAdapter(
        {"peft_type": "FULL"}, {"model.norm.weight": trained}, {"model.norm": forward}
    )


OWN_ROWS: tuple[OwnRow, ...] = (
    OwnRow("lora-sb", _by_module(_latent(of_gradient=True))),
    OwnRow("nlora", _by_module(_nystrom(False), init_lora_weights="n_lora", base_residual=False)),
    OwnRow(
        "nlora-paper",  # a start that is small: the inverse in it amplifies rounding
        _by_module(_nystrom(True, 1), init_lora_weights="n_lora", base_residual=True, lora_alpha=1),
    ),
    OwnRow("inttune", _by_module(_core("lora_N.weight"))),
    OwnRow("lamda", _by_module(_core("lora_S.weight"))),
    OwnRow("lamda-ranks", _by_module(_core_of_own_rank, rank_pattern=_RANKS)),
    OwnRow("lamda-start", _by_module(_with_start, init_lora_weights=True)),
    OwnRow("lora-xs", _by_module(_latent(of_gradient=False))),
    OwnRow(
        "lora-xs-new-peft",
        _by_module(
            _latent(of_gradient=False, spelled="default_lora_latent_mapping.weight"),
        ),
    ),
    OwnRow(
        "lora-multimodal",  # of the language model in a multimodal one
        _by_module(
            _plain,
            prefix="base_model.model.model.language_model.",
            target_modules=[name.removeprefix("model.") for name in _MODULES],
        ),
    ),
    OwnRow(
        "lora-ga-authors",
        _by_module(
            _loraga_authors,
            peft_type="LORAGA",
            init_lora_weights=True,
            r=8,
            lora_alpha=12,
            bsz=2,
            iters=64,
            direction="ArB2r",
            max_length=1024,
            dtype="fp32",
            scale="stable",
            stable_gamma=16,
        ),
    ),
    OwnRow("kasa-authors", _by_module(_kasa_authors)),
    OwnRow("randlora-authors", _randlora_authors),
    OwnRow(
        "pissa-residual",
        _by_module(_pissa_residual, init_lora_weights=True),
        refused="trained on a base without them.*convert ADAPTER NEW --initial pissa_init",
    ),
    OwnRow("lora-ga-factors", _by_module(_with_start, init_lora_weights="lora_ga")),
    OwnRow("corda-factors", _by_module(_with_start, init_lora_weights="corda")),
    OwnRow("comp-lora", _by_module(_comp_lora)),
    OwnRow(
        "sora",
        _by_module(_sora("lora_A", "lora_B", "gate"), prefix="", peft_type="SORA", r=8),
        executor=True,
    ),
    OwnRow(
        "sora-nested",
        _by_module(
            _sora("lora.lora_A", "lora.lora_B", "lora.gate"), prefix="", peft_type="SORA", r=8
        ),
    ),
    OwnRow(
        "loldu",
        _by_module(_loldu("lu"), prefix="", peft_type="LOLDU", lora_alpha=None),
    ),
    OwnRow(
        "loldu-z-alone",
        _by_module(_loldu("lu", z_alone=True), prefix="", peft_type="LOLDU", lora_alpha=None),
    ),
    OwnRow(
        "loldu-constant",
        _by_module(
            _loldu("constant"),
            prefix="",
            peft_type="LOLDU",
            r=6,
            lora_alpha=1,
            init_method="constant",
        ),
    ),
    OwnRow(
        "loldu-uniform",
        _by_module(
            _loldu("uniform"),
            prefix="",
            peft_type="LOLDU",
            r=6,
            lora_alpha=1,
            init_method="uniform",
        ),
    ),
    *(
        OwnRow(
            f"block-lora-{axis}-{n_blocks}{'-rslora' if rslora else ''}",
            _by_module(
                _block_lora(axis, n_blocks, rslora),
                peft_type="BLOCK_LORA",
                r=8,
                lora_alpha=12,
                n_blocks=n_blocks,
                block_axis=axis,
                use_rslora=rslora,
            ),
        )
        for axis, n_blocks, rslora in (
            ("rank", 2, False),
            ("rank", 4, True),
            ("feature", 2, False),
            ("feature", 4, True),
        )
    ),
    OwnRow("abmll", _by_module(_abmll, peft_type="ABMLL")),
    OwnRow("lofit", _lofit(scaled=True), executor=True),
    OwnRow("lofit-offsets", _lofit(scaled=False)),
    OwnRow("full", _full, executor=True),
    OwnRow("full-rows", _full_rows),
    OwnRow("full-final-norm", _full_final_norm),
)
