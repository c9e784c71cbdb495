"""Small adapters of every family for a tiny Llama, trained at random or untrained."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.adapters.round_trip import randomise
from tests.support.bases.tiny_models import untouched


class Sample(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]


# (model, an empty folder, whether it was trained: else it computes what the base computes)
Sampler = Callable[[PreTrainedModel, Path, bool], Sample]

_TARGETS = ["q_proj", "down_proj"]
_TASK = {"task_type": "CAUSAL_LM"}


def _peft(config: peft.PeftConfig) -> Sampler:
    """Return an adapter that PEFT saved: with random values, or as initialised."""

    def sample(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = peft.get_peft_model(untouched(model), copy.deepcopy(config))
            if is_trained:
                randomise(tuned, 0.3)
            tuned.save_pretrained(folder)
        values = json.loads((folder / "adapter_config.json").read_text())
        return Sample(values, load_file(folder / "adapter_model.safetensors"))

    return sample


def _own(
    peft_type: str, parts: Callable[[str, int, int, bool], Mapping[str, Tensor]], **values: Any
) -> Sampler:
    """``parts(module, n_in, n_out, is_trained)`` are the tensors of one target, by suffix."""

    def sample(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
        torch.manual_seed(11)
        config = {"peft_type": peft_type, "r": 2, "lora_alpha": 3, "target_modules": _TARGETS}
        tensors: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _TARGETS:
                n_out, n_in = module.weight.shape  # type: ignore[union-attr]
                made = parts(name, int(n_in), int(n_out), is_trained)
                tensors |= {f"base_model.model.{name}.{key}": t for key, t in made.items()}
        return Sample({**config, **values}, tensors)

    return sample


def _b(n_out: int, rank: int, is_trained: bool) -> Tensor:
    return torch.randn(n_out, rank) if is_trained else torch.zeros(n_out, rank)


def _sora(_: str, n_in: int, n_out: int, is_trained: bool) -> Mapping[str, Tensor]:
    a, b = torch.randn(2, n_in), _b(n_out, 2, is_trained)
    return {"lora_A": a, "lora_B": b, "gate": torch.randn(1, 2)}


def _abmll(_: str, n_in: int, n_out: int, is_trained: bool) -> Mapping[str, Tensor]:
    a, b = torch.randn(2, n_in), _b(n_out, 2, is_trained)
    spread = {"lora_A.log_std": torch.zeros(2, n_in), "lora_B.log_std": torch.zeros(n_out, 2)}
    return {"lora_A.weight": a, "lora_B.weight": b, **spread}


def _block_lora(_: str, n_in: int, n_out: int, is_trained: bool) -> Mapping[str, Tensor]:
    arms = torch.stack([_b(n_out, 2, is_trained) for _ in range(2)])
    return {"block_lora_A.weight": torch.randn(2, n_in), "block_lora_B.weight": arms}


def _routed(_: str, n_in: int, n_out: int, is_trained: bool) -> Mapping[str, Tensor]:
    tensors = {"moe_gate.weight": torch.randn(3, n_in)}
    for expert in range(3):
        tensors[f"experts.{expert}.lora_A.weight"] = torch.randn(2, n_in)
        tensors[f"experts.{expert}.lora_B.weight"] = _b(n_out, 2, is_trained)
    return tensors


def _loldu(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
    def parts(name: str, n_in: int, n_out: int, is_trained: bool) -> Mapping[str, Tensor]:
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr]
        d = torch.diagonal(torch.linalg.lu(weight)[2])[:2]  # type: ignore[arg-type]
        z = d + torch.randn(2) if is_trained else d.clone()
        return {"vector_z": z, "scaling_factor": torch.tensor([1.5])}

    return _own("LOLDU", parts)(model, folder, is_trained)


def _loraga(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
    config = peft.LoraConfig(r=2, target_modules=_TARGETS)
    made = _peft(config)(model, folder, is_trained)
    return made._replace(config={**made.config, "peft_type": "LORAGA"})


def _lofit(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
    torch.manual_seed(11)
    values = [torch.randn(8) if is_trained else torch.zeros(8) for _ in range(3)]
    tensors = {f"model.layers.{i}.self_attn.attn_v.1": value for i, value in enumerate(values)}
    return Sample({"peft_type": "LOFIT"}, tensors)


def _mixlora(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
    torch.manual_seed(11)
    tensors: dict[str, Tensor] = {}
    width, n_inner = model.config.hidden_size, model.config.intermediate_size
    for layer in range(3):
        root = f"mixlora.layers.{layer}"
        tensors[f"{root}.self_attn.q_proj.lora_A.weight"] = torch.randn(2, width)
        tensors[f"{root}.self_attn.q_proj.lora_B.weight"] = _b(width, 2, is_trained)
        tensors[f"{root}.mlp.moe_gate.weight"] = torch.randn(3, width)
        for expert in range(3):
            at = f"{root}.mlp.down_proj.experts.{expert}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(2, n_inner)
            tensors[f"{at}.lora_B.weight"] = _b(width, 2, is_trained)
    config = {"peft_type": "MIXLORA", "r": 2, "lora_alpha": 3, "target_modules": _TARGETS}
    return Sample({**config, "routing_strategy": "mixlora", "num_experts": 3}, tensors)


def _full(model: PreTrainedModel, folder: Path, is_trained: bool) -> Sample:
    torch.manual_seed(11)
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    if is_trained:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
            tensors[name] += 0.1 * torch.randn(tensors[name].shape)
    return Sample({"peft_type": "FULL"}, tensors)


SAMPLES: Mapping[str, Sampler] = {
    "ABMLL": _own("ABMLL", _abmll),
    "ADALORA": _peft(peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=_TARGETS)),
    "BEFT": _peft(peft.BeftConfig(target_modules=_TARGETS)),
    "BLOCK_LORA": _own("BLOCK_LORA", _block_lora, r=4, n_blocks=2),
    "BOFT": _peft(peft.BOFTConfig(boft_block_size=4, target_modules=_TARGETS)),
    "C3A": _peft(peft.C3AConfig(block_size=4, target_modules=_TARGETS)),
    "CARTRIDGE": _peft(peft.CartridgeConfig(num_virtual_tokens=3, **_TASK)),
    "CPT": _peft(
        peft.CPTConfig(cpt_token_ids=[3, 9], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **_TASK)
    ),
    "DEFT": _peft(peft.DeftConfig(r=2, alpha=3, target_modules=_TARGETS)),
    "DELORA": _peft(peft.DeloraConfig(r=2, target_modules=_TARGETS)),
    "FOURIERFT": _peft(peft.FourierFTConfig(n_frequency=20, target_modules=_TARGETS)),
    "FROD": _peft(peft.FrodConfig(target_modules=_TARGETS)),
    "FULL": _full,
    "GLORA": _peft(peft.GloraConfig(r=2, target_modules=_TARGETS)),
    "GRALORA": _peft(peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=_TARGETS)),
    "HIRA": _peft(peft.HiraConfig(r=2, target_modules=_TARGETS)),
    "HRA": _peft(peft.HRAConfig(r=2, target_modules=_TARGETS)),
    "IA3": _peft(peft.IA3Config(target_modules=_TARGETS, feedforward_modules=["down_proj"])),
    "LN_TUNING": _peft(peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "LOFIT": _lofit,
    "LOHA": _peft(peft.LoHaConfig(r=2, alpha=3, target_modules=_TARGETS)),
    "LOKR": _peft(peft.LoKrConfig(r=2, alpha=3, target_modules=_TARGETS)),
    "LOLDU": _loldu,
    "LORA": _peft(peft.LoraConfig(r=2, target_modules=_TARGETS)),
    "LORAGA": _loraga,
    "LORAMOE": _own("LORAMOE", _routed, num_experts=3),
    "MISS": _peft(peft.MissConfig(r=2, target_modules=_TARGETS)),
    "MIXLORA": _mixlora,
    "MOLA": _own("MOLA", _routed, num_experts=3, top_k=2),
    "MULTITASK_PROMPT_TUNING": _peft(
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=1, num_ranks=2, **_TASK)
    ),
    "OFT": _peft(peft.OFTConfig(oft_block_size=4, r=0, target_modules=_TARGETS)),
    "OSF": _peft(peft.OSFConfig(effective_rank=28, target_modules=_TARGETS)),
    "PEANUT": _peft(peft.PeanutConfig(r=2, target_modules=_TARGETS)),
    "PREFIX_TUNING": _peft(peft.PrefixTuningConfig(num_virtual_tokens=3, **_TASK)),
    "PROMPT_TUNING": _peft(peft.PromptTuningConfig(num_virtual_tokens=3, **_TASK)),
    "PSOFT": _peft(peft.PsoftConfig(r=2, target_modules=_TARGETS)),
    "PVERA": _peft(peft.PveraConfig(r=2, target_modules=_TARGETS)),
    "P_TUNING": _peft(peft.PromptEncoderConfig(num_virtual_tokens=3, **_TASK)),
    "RANDLORA": _peft(peft.RandLoraConfig(r=2, target_modules=_TARGETS)),
    "ROAD": _peft(peft.RoadConfig(group_size=4, target_modules=_TARGETS)),
    "SHIRA": _peft(peft.ShiraConfig(r=2, target_modules=_TARGETS)),
    "SORA": _own("SORA", _sora),
    "SUPERTUNING": _peft(peft.SupertuningConfig(sparsity=0.9, target_modules=_TARGETS)),
    "TINYLORA": _peft(peft.TinyLoraConfig(r=2, u=4, target_modules=_TARGETS)),
    "TRAINABLE_TOKENS": _peft(peft.TrainableTokensConfig(token_indices=[5, 33])),
    "UNILORA": _peft(peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=_TARGETS)),
    "VBLORA": _peft(
        peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=_TARGETS)
    ),
    "VERA": _peft(peft.VeraConfig(r=2, target_modules=_TARGETS)),
    "WAVEFT": _peft(peft.WaveFTConfig(n_frequency=20, target_modules=_TARGETS)),
}

PROMPTS = frozenset(
    {
        *("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
        *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
    }
)

# They have no rank that a limit could concern.
UNRANKED = frozenset(
    {
        *("BEFT", "IA3", "LN_TUNING", "LOFIT", "TRAINABLE_TOKENS"),
        *("BOFT", "C3A", "FOURIERFT", "FROD", "OFT", "ROAD", "SHIRA", "SUPERTUNING", "WAVEFT"),
        *("PVERA", "RANDLORA", "VERA"),  # shared bases
        "OSF",  # above the limit it is served as a dense delta
    }
)

# Untrained, they compute something else than the base, if only by rounding (FRoD).
NEVER_INERT = PROMPTS | {"C3A", "FOURIERFT", "FROD", "UNILORA", "VBLORA"}

# Tensors that a file may lack, as patterns.
OPTIONAL: Mapping[str, str] = {
    "ABMLL": r"log_std",
    "DELORA": r"delora_w_norm",  # follows from the base
    "FULL": r"",  # what the checkpoint lacks was not trained
    "GLORA": r"\.zeros$",
    "LOFIT": r"",  # a head without an offset
    "LOLDU": r"scaling_factor$",  # its authors' default
    "RANDLORA": r"randlora_[AB]$",  # every module has a copy
}
