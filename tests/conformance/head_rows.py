"""Classifiers: a head beside every kind of adapter that PEFT saves one with."""

import peft
from peft import LoraConfig

from tests.conformance.peft_row import PeftRow, moved, on

_SEQ, _TOKEN = "SEQ_CLS", "TOKEN_CLS"
_IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

HEAD_ROWS: tuple[PeftRow, ...] = (
    # a class of a text
    PeftRow(
        "seq-lora",
        lambda: LoraConfig(task_type=_SEQ, r=4, target_modules=on("q_proj", "v_proj", "up_proj")),
        moved(0.03),
        task=_SEQ,
        executor=True,
    ),
    PeftRow(
        "seq-rslora-bias",
        lambda: LoraConfig(
            task_type=_SEQ, r=4, use_rslora=True, lora_bias=True, target_modules=on("o_proj")
        ),
        moved(0.03),
        task=_SEQ,
    ),
    PeftRow(
        "seq-dora",
        lambda: LoraConfig(
            task_type=_SEQ, r=4, use_dora=True, target_modules=on("q_proj", "down_proj")
        ),
        moved(0.03),
        task=_SEQ,
        executor=True,
    ),
    PeftRow(
        "seq-pissa",
        lambda: LoraConfig(
            task_type=_SEQ,
            r=4,
            lora_alpha=4,
            init_lora_weights="pissa",
            target_modules=on("q_proj", "up_proj"),
        ),
        moved(0.03),
        task=_SEQ,
        rewrites_base=True,
    ),
    PeftRow(
        "seq-norms-saved",
        lambda: LoraConfig(
            task_type=_SEQ, r=4, target_modules=on("q_proj"), modules_to_save=["score", "norm"]
        ),
        moved(0.02),
        task=_SEQ,
    ),
    PeftRow(
        "seq-ia3",
        lambda: peft.IA3Config(task_type=_SEQ, **_IA3),
        moved(0.1),
        task=_SEQ,
        executor=True,
    ),
    PeftRow(
        "seq-adalora",
        lambda: peft.AdaLoraConfig(
            task_type=_SEQ, init_r=6, target_r=3, target_modules=on("q_proj"), total_step=10
        ),
        moved(0.2),
        task=_SEQ,
    ),
    PeftRow(
        "seq-vera",
        lambda: peft.VeraConfig(task_type=_SEQ, r=5, target_modules=on("q_proj", "v_proj")),
        moved(0.3),
        task=_SEQ,
    ),
    PeftRow(
        "seq-loha",
        lambda: peft.LoHaConfig(task_type=_SEQ, r=3, target_modules=on("q_proj", "v_proj")),
        moved(0.1),
        task=_SEQ,
    ),
    PeftRow(
        "seq-lokr",
        lambda: peft.LoKrConfig(task_type=_SEQ, r=4, target_modules=on("q_proj", "v_proj")),
        moved(0.05),
        task=_SEQ,
    ),
    PeftRow(
        "seq-oft",
        lambda: peft.OFTConfig(
            task_type=_SEQ, oft_block_size=32, target_modules=on("q_proj", "v_proj")
        ),
        moved(0.05),
        task=_SEQ,
    ),
    # a class of each token
    PeftRow(
        "token-lora",
        lambda: LoraConfig(task_type=_TOKEN, r=4, target_modules=on("q_proj", "v_proj", "up_proj")),
        moved(0.03),
        task=_TOKEN,
        executor=True,
    ),
    PeftRow(
        "token-dora",
        lambda: LoraConfig(
            task_type=_TOKEN, r=4, use_dora=True, target_modules=on("q_proj", "down_proj")
        ),
        moved(0.03),
        task=_TOKEN,
    ),
    PeftRow("token-ia3", lambda: peft.IA3Config(task_type=_TOKEN, **_IA3), moved(0.1), task=_TOKEN),
    PeftRow(
        "token-loha",
        lambda: peft.LoHaConfig(task_type=_TOKEN, r=3, target_modules=on("q_proj", "v_proj")),
        moved(0.1),
        task=_TOKEN,
    ),
)
