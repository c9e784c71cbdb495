"""PEFT's other methods: every type and every option that is served, or is refused."""

import peft

from tests.conformance.peft_row import PeftRow, drawn, kept_ranks, moved, on

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NOT_YET = "cannot be served"

PEFT_ROWS: tuple[PeftRow, ...] = (
    # low rank
    PeftRow(
        "adalora",
        lambda: peft.AdaLoraConfig(
            init_r=6, target_r=3, lora_alpha=20, target_modules=on("q_proj"), total_step=10
        ),
        moved(0.2),
    ),
    PeftRow(
        "adalora-pruned",
        lambda: peft.AdaLoraConfig(
            init_r=6,
            target_r=2,
            target_modules=on("q_proj", "v_proj"),
            total_step=10,
            tinit=1,
            tfinal=1,
        ),
        kept_ranks(0.2),
    ),
    PeftRow(
        "vera",
        lambda: peft.VeraConfig(r=5, target_modules=on(*_ALL)),
        moved(0.3),
        executor=True,
    ),
    PeftRow(
        "pvera",
        lambda: peft.PveraConfig(r=5, target_modules=on(*_ALL)),
        moved(0.3),
    ),
    PeftRow(
        "randlora",
        lambda: peft.RandLoraConfig(r=32, randlora_alpha=64, target_modules=on("q_proj", "k_proj")),
        moved(0.05),
        executor=True,
    ),
    PeftRow(
        "randlora-sparse",
        lambda: peft.RandLoraConfig(
            r=32, randlora_alpha=64, sparse=True, target_modules=on("v_proj")
        ),
        moved(0.05),
    ),
    PeftRow("miss", lambda: peft.MissConfig(r=6, target_modules=on(*_ALL)), moved(0.02)),
    PeftRow(
        "miss-mini",
        lambda: peft.MissConfig(
            r=4, mini_r=8, init_weights="mini", target_modules=on("q_proj", "v_proj")
        ),
        moved(0.05),
    ),
    PeftRow(
        "tinylora",
        lambda: peft.TinyLoraConfig(r=2, u=9, target_modules=on("q_proj", "down_proj")),
        moved(0.3),
    ),
    PeftRow(
        "loha",
        lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=on("q_proj", "down_proj")),
        moved(0.2),
    ),
    PeftRow(
        "gralora",
        lambda: peft.GraloraConfig(r=8, alpha=16, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
    ),
    PeftRow(
        "gralora-hybrid",
        lambda: peft.GraloraConfig(
            r=8, hybrid_r=4, alpha=16, target_modules=on("q_proj", "down_proj")
        ),
        moved(0.05),
    ),
    PeftRow(
        "vblora",
        lambda: peft.VBLoRAConfig(
            r=4, num_vectors=32, vector_length=64, target_modules=on("q_proj", "down_proj")
        ),
        moved(0.1),
    ),
    PeftRow(
        "vblora-topk",
        lambda: peft.VBLoRAConfig(
            r=4,
            num_vectors=32,
            vector_length=64,
            save_only_topk_weights=True,
            target_modules=on("q_proj", "down_proj"),
        ),
        moved(0.1),
    ),
    PeftRow(
        "delora",
        lambda: peft.DeloraConfig(r=8, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
    ),
    # vectors, norms, rows, prompts
    PeftRow(
        "ia3",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "ia3-gate-up",  # inputs that packed linears share
        lambda: peft.IA3Config(
            target_modules=["k_proj", "gate_proj", "up_proj"],
            feedforward_modules=["gate_proj", "up_proj"],
        ),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "beft",
        lambda: peft.BeftConfig(target_modules=["v_proj"]),
        moved(0.05),
        executor=True,
    ),
    PeftRow(
        "ln-tuning",
        lambda: peft.LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        moved(0.02),
        executor=True,
    ),
    PeftRow(
        "ln-tuning-of-layers",
        lambda: peft.LNTuningConfig(target_modules=["post_attention_layernorm"]),
        moved(0.02),
    ),
    PeftRow(
        "trainable-tokens",
        lambda: peft.TrainableTokensConfig(token_indices=[504, 2067, 355, 253]),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "prompt-tuning",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        drawn(0.1),
        executor=True,
    ),
    PeftRow(
        "p-tuning",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=32, task_type="CAUSAL_LM"
        ),
        drawn(0.1),
    ),
    PeftRow(
        "p-tuning-lstm",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_hidden_size=32,
            encoder_reparameterization_type="LSTM",
            task_type="CAUSAL_LM",
        ),
        drawn(0.05),
    ),
    PeftRow(
        "prefix-tuning",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        drawn(0.2),
        executor=True,
    ),
    PeftRow(
        "prefix-projection",
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5,
            encoder_hidden_size=32,
            prefix_projection=True,
            task_type="CAUSAL_LM",
        ),
        drawn(0.07),
    ),
    # what multiplies W, or whose change has full rank
    PeftRow(
        "lokr",
        lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=on("q_proj", "down_proj")),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "lokr-both",
        lambda: peft.LoKrConfig(
            r=2,
            alpha=4,
            decompose_both=True,
            decompose_factor=8,
            target_modules=on("q_proj", "down_proj"),
        ),
        moved(0.2),
    ),
    PeftRow(
        "oft",
        lambda: peft.OFTConfig(
            r=0,
            oft_block_size=32,
            use_cayley_neumann=False,
            target_modules=on("q_proj", "down_proj"),
        ),
        moved(0.05),
        executor=True,
    ),
    PeftRow(
        "oft-neumann",
        lambda: peft.OFTConfig(r=0, oft_block_size=32, target_modules=on("q_proj", "down_proj")),
        moved(0.02),
    ),
    PeftRow(
        "oft-shared",
        lambda: peft.OFTConfig(
            r=0,
            oft_block_size=32,
            block_share=True,
            coft=True,
            eps=0.1,
            use_cayley_neumann=False,
            target_modules=on("q_proj", "down_proj"),
        ),
        moved(0.05),
    ),
    PeftRow(
        "boft",
        lambda: peft.BOFTConfig(boft_block_size=8, target_modules=on("q_proj", "down_proj")),
        moved(0.1),
    ),
    PeftRow(
        "boft-butterfly",
        lambda: peft.BOFTConfig(
            boft_block_size=8,
            boft_n_butterfly_factor=2,
            target_modules=on("q_proj", "down_proj"),
        ),
        moved(0.1),
    ),
    PeftRow(
        "hra",
        lambda: peft.HRAConfig(r=4, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
    ),
    PeftRow(
        "hra-gram-schmidt",
        lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
    ),
    PeftRow(
        "road-1",
        lambda: peft.RoadConfig(
            variant="road_1", group_size=64, target_modules=on("q_proj", "up_proj")
        ),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "road-2",
        lambda: peft.RoadConfig(
            variant="road_2", group_size=64, target_modules=on("q_proj", "up_proj")
        ),
        moved(0.1),
    ),
    PeftRow(
        "road-4",
        lambda: peft.RoadConfig(
            variant="road_4", group_size=64, target_modules=on("q_proj", "up_proj")
        ),
        moved(0.1),
    ),
    PeftRow(
        "fourierft",
        lambda: peft.FourierFTConfig(n_frequency=200, target_modules=on("q_proj", "down_proj")),
        moved(1.0),
        executor=True,
    ),
    PeftRow(
        "waveft",
        lambda: peft.WaveFTConfig(n_frequency=300, target_modules=on("q_proj", "down_proj")),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "c3a",
        lambda: peft.C3AConfig(block_size=64, target_modules=on("q_proj", "down_proj")),
        moved(2.0),
        executor=True,
    ),
    PeftRow(
        "shira",
        lambda: peft.ShiraConfig(r=4, random_seed=3, target_modules=on("q_proj", "down_proj")),
        moved(0.1),
    ),
    PeftRow(
        "supertuning",
        lambda: peft.SupertuningConfig(target_modules=on("q_proj", "down_proj")),
        moved(0.1),
    ),
    PeftRow(
        "hira",
        lambda: peft.HiraConfig(r=8, target_modules=on("q_proj", "down_proj")),
        moved(0.1),
        executor=True,
    ),
    PeftRow(
        "psoft",
        lambda: peft.PsoftConfig(r=16, psoft_alpha=16, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
        rewrites_base=True,
    ),
    PeftRow(
        "miss-bat",
        lambda: peft.MissConfig(r=64, init_weights="bat", target_modules=on("q_proj", "v_proj")),
        moved(0.01),
        executor=True,
    ),
    PeftRow(
        "frod",
        lambda: peft.FrodConfig(target_modules=on("q_proj", "down_proj"), progressbar=False),
        moved(0.05),
        rewrites_base=True,
    ),
    PeftRow(
        "glora",
        lambda: peft.GloraConfig(r=4, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
        executor=True,
    ),
    PeftRow(
        "unilora",
        lambda: peft.UniLoraConfig(r=4, target_modules=on("q_proj", "down_proj")),
        moved(0.5),
    ),
    PeftRow(
        "unilora-indices",
        lambda: peft.UniLoraConfig(
            r=4, save_indices=True, target_modules=on("q_proj", "down_proj")
        ),
        moved(0.5),
    ),
    PeftRow(
        "lily",
        lambda: peft.LilyConfig(r=8, target_modules=["q_proj"]),
        moved(0.02),
        refused="LILY",
    ),
    PeftRow(
        "osf",
        lambda: peft.OSFConfig(effective_rank=500, target_modules=on("q_proj")),
        moved(0.03),
        rewrites_base=True,
    ),
    PeftRow(
        "peanut",
        lambda: peft.PeanutConfig(r=4, target_modules=on("q_proj")),
        moved(0.05),
    ),
    PeftRow(
        "peanut-deep",
        lambda: peft.PeanutConfig(r=4, depth=2, act_fn="gelu", target_modules=on("q_proj")),
        moved(0.1),
    ),
    PeftRow(
        "deft",
        lambda: peft.DeftConfig(r=4, target_modules=on("q_proj")),
        moved(0.05),
    ),
    PeftRow(
        "deft-para",
        lambda: peft.DeftConfig(r=4, para=True, target_modules=on("q_proj", "down_proj")),
        moved(0.05),
    ),
    # what adds more than a change of modules
    PeftRow(
        "cartridge",
        lambda: peft.CartridgeConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        drawn(0.2),
    ),
    PeftRow(
        "cpt",
        lambda: peft.CPTConfig(
            cpt_token_ids=[504, 2067, 355],
            cpt_mask=[1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3],
            task_type="CAUSAL_LM",
        ),
        moved(0.1),
    ),
    PeftRow(
        "adaption-prompt",
        lambda: peft.AdaptionPromptConfig(
            adapter_len=4, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM"
        ),
        moved(0.1),
        rewrites_base=True,
        refused=_NOT_YET,
    ),
    PeftRow(
        "multitask-prompt",
        lambda: peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=5, num_tasks=2, task_type="CAUSAL_LM"
        ),
        drawn(0.3),
        task_id=1,
    ),
    PeftRow(
        "poly",
        lambda: peft.PolyConfig(r=4, n_tasks=2, n_skills=2, target_modules=on("q_proj")),
        moved(0.05),
        refused="task id",
    ),
)
