"""Measures what KaSA's start does to a base before the first step.

    python -m research.recipes.kasa_start --data FOLDER [--task card_problem] [--rank 8]

FOLDER is that of ``research.natural``. Prints mean losses of the default base, in float32, on the
first answers of the task's test, with the task's sentence as system turn. They are those of the
base, of PEFT's KaSA, and of bases where linears of some kinds have lost their smallest singular
values. The CPU seconds are those of the decompositions of all linears.
"""

import argparse
import json
import time
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loraplex_server.model.loading.pull import resolve_model

_ROWS = 12
_LEFT_OUT = ("v_proj", "up_proj")
Row = tuple[Tensor, int]  # the tokens of a chat, and where its answer begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="card_problem")
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    path = resolve_model()
    rows = _rows(json.loads((options.data / f"{options.task}.json").read_text()), path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(f"base: {_loss(model, rows):.2f}")

    began = time.process_time()
    minor = _minor(model, options.rank)
    seconds = time.process_time() - began
    kinds = {name.rpartition(".")[2]: None for name in minor}
    for kind in kinds:
        print(f"{kind} alone: {_truncated_loss(model, minor, (kind,), rows):.2f}")
    others = tuple(kind for kind in kinds if kind not in _LEFT_OUT)
    print(f"all but {', '.join(_LEFT_OUT)}: {_truncated_loss(model, minor, others, rows):.2f}")

    settings = peft.LoraConfig(
        r=options.rank, kasa_config=peft.KasaConfig(), target_modules="all-linear"
    )
    kasa = peft.get_peft_model(model, settings).eval()
    print(f"PEFT's KaSA: {_loss(kasa, rows):.2f}")
    print(f"decompositions: {seconds:.0f} s of CPU")


def _rows(task: dict[str, list[str]], path: Path) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt, answer in task["test"][:_ROWS]:
        asked = [
            {"role": "system", "content": task["descriptions"][0]},
            {"role": "user", "content": prompt},
        ]
        whole = [*asked, {"role": "assistant", "content": answer}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(whole, tokenize=False).rstrip("\n")
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        rows.append((tokens, len(tokenizer(start, add_special_tokens=False).input_ids)))
    return rows


@torch.inference_mode()
def _loss(model: nn.Module, rows: list[Row]) -> float:
    """Return the mean loss of the answers' tokens, the end token included."""
    losses = []
    for tokens, start in rows:
        logits = model(input_ids=tokens).logits[0, start - 1 : -1]
        losses.append(nn.functional.cross_entropy(logits, tokens[0, start:], reduction="none"))
    return float(torch.cat(losses).mean())


def _minor(model: PreTrainedModel, rank: int) -> dict[str, Tensor]:
    """Return the part of the ``rank`` smallest singular values of each linear but the head."""
    minor = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            minor[name] = (u[:, -rank:] * s[-rank:]) @ v[-rank:]
    return minor


@torch.no_grad()
def _truncated_loss(
    model: PreTrainedModel, minor: dict[str, Tensor], kinds: tuple[str, ...], rows: list[Row]
) -> float:
    """Return the loss while the linears of these kinds lack their minor part."""
    parts = {name: part for name, part in minor.items() if name.endswith(kinds)}
    weights = {name: model.base_model.get_submodule(name).weight for name in parts}
    kept = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight -= parts[name]
    loss = _loss(model, rows)
    for name, weight in weights.items():
        weight.copy_(kept[name])
    return loss


if __name__ == "__main__":
    main()
