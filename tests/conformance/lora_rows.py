"""LoRA and what PEFT saves as such: every option that is served."""

import peft
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, LoraGAConfig

from tests.conformance.peft_row import PeftRow, moved, on, seen_gradients

LORA_ROWS: tuple[PeftRow, ...] = (
    # scales, ranks, choices of modules
    PeftRow(
        "lora-plain",
        lambda: LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "lora-rslora",
        lambda: LoraConfig(r=9, lora_alpha=12, use_rslora=True, target_modules=["k_proj"]),
        moved(0.03),
    ),
    PeftRow(
        "lora-all-linear",
        lambda: LoraConfig(r=3, target_modules="all-linear"),
        moved(0.01),
        executor=True,
    ),
    PeftRow(
        "lora-regex",
        lambda: LoraConfig(r=3, target_modules=r".*\.(0|5)\.mlp\.(gate|down)_proj"),
        moved(0.03),
    ),
    PeftRow(
        "lora-patterns",
        lambda: LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
            alpha_pattern={r"layers.(0|2).self_attn.q_proj": 21},
        ),
        moved(0.02),
    ),
    PeftRow(
        "lora-layers",
        lambda: LoraConfig(
            r=4,
            target_modules=["o_proj", "down_proj"],
            layers_to_transform=[0, 2, 5],
            layers_pattern="layers",
        ),
        moved(0.03),
    ),
    PeftRow(
        "lora-modules",
        lambda: LoraConfig(
            r=4, target_modules=["model.layers.3.self_attn.q_proj", "model.layers.5.mlp.up_proj"]
        ),
        moved(0.05),
    ),
    PeftRow(
        "lora-excluded",
        lambda: LoraConfig(
            r=4, target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]
        ),
        moved(0.03),
    ),
    PeftRow(
        "lora-scale-one",
        lambda: LoraConfig(r=6, lora_alpha=6, target_modules=["v_proj"]),
        moved(0.02),
    ),
    PeftRow(
        "lora-rank-64",
        lambda: LoraConfig(r=64, lora_alpha=16, target_modules=on("q_proj", "up_proj")),
        moved(0.03),
    ),
    PeftRow(
        "lora-bias",
        lambda: LoraConfig(r=4, lora_bias=True, target_modules=on("o_proj", "up_proj")),
        moved(0.03),
        executor=True,
    ),
    # starts that leave a plain LoRA
    PeftRow(
        "lora-gaussian",
        lambda: LoraConfig(r=4, init_lora_weights="gaussian", target_modules=on("v_proj")),
        moved(0.05),
    ),
    PeftRow(
        "lora-orthogonal",
        lambda: LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=on("v_proj")),
        moved(0.05),
    ),
    PeftRow(
        "lora-eva",
        lambda: LoraConfig(
            r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(), target_modules=on("v_proj")
        ),
        moved(0.05),
    ),
    PeftRow(
        "lora-mica",
        lambda: LoraConfig(r=4, init_lora_weights="mica", target_modules=on("v_proj")),
        moved(0.05),
    ),
    # starts that change the base
    PeftRow(
        "pissa",
        lambda: LoraConfig(
            r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=on("q_proj", "up_proj")
        ),
        moved(0.03),
        rewrites_base=True,
    ),
    PeftRow(
        "pissa-converted",
        lambda: LoraConfig(
            r=4, lora_alpha=4, init_lora_weights="pissa_niter_4", target_modules=on("q_proj")
        ),
        moved(0.03),
        keeps_start=True,
        rewrites_base=True,
    ),
    PeftRow(
        "lora-ga-converted",
        lambda: LoraConfig(
            r=4,
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(),
            target_modules=on("q_proj"),
        ),
        moved(0.01),
        start=seen_gradients,
        keeps_start=True,
        rewrites_base=True,
    ),
    PeftRow(
        "olora",
        lambda: LoraConfig(
            r=4, lora_alpha=6, init_lora_weights="olora", target_modules=on("v_proj")
        ),
        moved(0.03),
        rewrites_base=True,
    ),
    PeftRow(
        "kasa",
        lambda: LoraConfig(
            r=4, kasa_config=peft.KasaConfig(), target_modules=on("q_proj", "down_proj")
        ),
        moved(0.03),
        rewrites_base=True,
    ),
    # other forms of the product
    PeftRow(
        "dora",
        lambda: LoraConfig(r=4, use_dora=True, target_modules=on("q_proj", "down_proj")),
        moved(0.03),
        executor=True,
    ),
    PeftRow(
        "dora-rslora",
        lambda: LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=on("k_proj")),
        moved(0.05),
    ),
    PeftRow(
        "bd-lora",
        lambda: LoraConfig(
            r=4,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
            ),
            target_modules=on("q_proj", "o_proj"),
        ),
        moved(0.05),
    ),
    # embeddings, head, norms, rows
    PeftRow(
        "lora-head",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "lora-embedding",
        lambda: LoraConfig(r=4, target_modules=["embed_tokens"]),
        moved(0.01),
        executor=True,
    ),
    PeftRow(
        "lora-embedding-and-linear",
        lambda: LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"]),
        moved(0.01),
    ),
    PeftRow(
        "saved-head",
        lambda: LoraConfig(r=4, target_modules=on("q_proj"), modules_to_save=["lm_head"]),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "saved-embedding",
        lambda: LoraConfig(r=4, target_modules=on("q_proj"), modules_to_save=["embed_tokens"]),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "saved-embedding-tied",
        lambda: LoraConfig(
            r=4,
            target_modules=on("q_proj"),
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        moved(0.02),
    ),
    PeftRow(
        "saved-norm",
        lambda: LoraConfig(r=4, target_modules=on("q_proj"), modules_to_save=["norm"]),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "saved-norms-of-layers",
        lambda: LoraConfig(
            r=4, target_modules=on("q_proj"), modules_to_save=["post_attention_layernorm"]
        ),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "saved-projection",
        lambda: LoraConfig(
            r=4, target_modules=on("q_proj"), modules_to_save=["layers.2.mlp.down_proj"]
        ),
        moved(0.02),
    ),
    PeftRow(
        "tokens-with-lora",
        lambda: LoraConfig(
            r=4, target_modules=on("q_proj"), trainable_token_indices=[504, 2067, 355]
        ),
        moved(0.1),
    ),
    PeftRow(
        "tokens-tied",
        lambda: LoraConfig(
            r=4,
            target_modules=on("q_proj"),
            trainable_token_indices=[504, 2067, 355],
            ensure_weight_tying=True,
        ),
        moved(0.1),
    ),
    # activated: by the first prompt, by the second
    PeftRow(
        "activated-lora",
        lambda: LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            alora_invocation_tokens=[282, 4649],
            task_type="CAUSAL_LM",
        ),
        moved(0.03),
        executor=True,
    ),
    PeftRow(
        "activated-lora-all-linear",
        lambda: LoraConfig(
            r=3,
            target_modules="all-linear",
            alora_invocation_tokens=[665, 436],
            task_type="CAUSAL_LM",
            lora_bias=True,
            use_rslora=True,
        ),
        moved(0.02),
    ),
    PeftRow(
        "activated-lora-of-head",
        lambda: LoraConfig(
            r=4,
            target_modules=["q_proj", "lm_head"],
            alora_invocation_tokens=[665, 436],
            task_type="CAUSAL_LM",
        ),
        moved(0.03),
        refused="activated LoRA with lm_head",
    ),
    # what needs more than its own file
    PeftRow(
        "layer-replication",
        lambda: LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 4], [2, 6]]),
        moved(0.02),
        refused="layer_replication",
    ),
)
