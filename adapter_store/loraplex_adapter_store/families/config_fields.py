"""Fields of adapter_config.json without effect on serving; readers act on all others.

``AdapterConfig`` knows which fields a reader asked for. Of the others, those named here matter only
while an adapter is trained or initialised, and those that are null, false or empty say nothing. Any
other is refused: it may change what the adapter computes.
"""

from __future__ import annotations

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.errors import UnsupportedAdapter

__all__ = ["check_fields"]

_IGNORED = frozenset(
    {
        # provenance
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type"),
        *("peft_version", "revision", "runtime_config", "task_type", "id2label", "label2id"),
        # schedules, losses, memory
        *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit"),
        *(
            "total_step",
            "velora_config",
            "progressbar",
            "cpt_mask",
            "cpt_token_ids",
            "cpt_tokens_type_mask",
        ),
        *("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"),
        *("opt_weighted_loss_type", "num_frozen_tokens"),
        *("jitter_noise", "router_aux_loss_coef", "router_init_range", "router_loss"),
        *("router_z_loss_coef", "expert_capacity", "blc_alpha", "blc_weight"),
        # where trained values started; what that did to the base is init_lora_weights' business
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        *("d_initial", "delora_lambda", "prompt_tuning_init", "prompt_tuning_init_task"),
        *("prompt_tuning_init_text", "prompt_tuning_init_state_dict_path", "tokenizer_kwargs"),
        *("tokenizer_name_or_path", "encoder_hidden_size", "encoder_num_layers"),
        *("encoder_reparameterization_type", "prefix_projection"),
        # drawn at random in training, and read from the file here
        *("projection_prng_key", "projection_seed", "proj_seed", "random_seed"),
        *("save_projection", "sparse", "very_sparse", "sparse_rate", "regularization_alpha"),
        *("mask_type",),
        # sizes that the tensors show
        *("r", "rank_pattern", "mini_r", "u", "weight_tying", "effective_rank", "gralora_k"),
        *("hybrid_r", "num_vectors", "vector_length", "theta_d_length"),
        *("block_size", "block_size_pattern", "decompose_both", "decompose_factor"),
        *("boft_block_num", "boft_block_size", "boft_n_butterfly_factor", "oft_block_size"),
        *("n_frequency", "n_frequency_pattern", "proportional_parameters", "sparsity"),
        *("num_attention_heads", "num_layers", "token_dim"),
        # cancels out: the base's singular values are divided by it
        "psoft_alpha",
        # the base says how its weights are stored
        *("fan_in_fan_out", "use_effective_conv2d"),
        # options of options that are refused
        *("megatron_core", "qalora_group_size"),
        # left by trainers: ms-swift, Unsloth, old PEFT
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "unsloth_fixed"),
    }
)


def check_fields(config: AdapterConfig) -> None:
    """After the reader. Raises UnsupportedAdapter with the fields that nobody acted on."""
    unknown = {
        key: value
        for key, value in sorted(config.unread.items())
        if key not in _IGNORED and not _is_of_training(key, value)
    }
    if unknown:
        raise UnsupportedAdapter(
            f"adapter_config.json: no reader of {config.peft_type} acts on {', '.join(unknown)}; "
            "it may change what the adapter computes. Remove it if it concerns training only",
            [f"{key}: {str(value)[:80]}" for key, value in unknown.items()],
        )


def _is_of_training(key: str, value: object) -> bool:
    """Dropout, and initialisations by number or switch; one that has a name may change the base."""
    if key.endswith("_dropout"):
        return True
    return key.startswith("init_") and isinstance(value, bool | int | float)
