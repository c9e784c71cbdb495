"""Known adapters, reconstructed by ICM-LoRA and SG-LoRA: accuracy and storage.

    python -m research.generation.reconstruct FOLDER [--base BASE] [--rows 20]

FOLDER holds an adapter in each subfolder, of one rank and target set, with a ``card.json``
(description, and example prompts to fit on) and a ``test.jsonl`` of {"prompt", "answer"}. As the
ICM-LoRA paper does, each adapter is made again from its own task vector, here over the prompts of
the test, and both answer the test. Storage is the fitted file against the adapters' own files.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_generation.examples import Example, read_pairs
from loraplex_generation.experts.expert import weighted_sum
from loraplex_generation.experts.fitted import EXPERTS_FILE, FittedExperts
from loraplex_generation.experts.icm_lora import task_texts
from loraplex_generation.experts.task_states import encode_task, last_states
from loraplex_generation.sentences import SentenceEncoder
from loraplex_server.cli.generator import train
from loraplex_server.model.loading.pull import resolve_encoder, resolve_model


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    base: Annotated[str | None, typer.Option(help="Default: the pulled base.")] = None,
    rows: Annotated[int, typer.Option(help="Test rows of each adapter.", min=8)] = 20,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.", min=1)] = 48,
    steps: Annotated[int, typer.Option(help="Training steps of each network.", min=1)] = 1000,
) -> None:
    """Print exact match of base, original and reconstructions, then the bytes."""
    directory = resolve_model(base)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = SentenceEncoder(resolve_encoder())
    with TemporaryDirectory() as out:
        train(Path(out), folders=[folder], base=base, steps=steps)
        fitted = FittedExperts.load(Path(out) / EXPERTS_FILE)
        n_fitted = (Path(out) / EXPERTS_FILE).stat().st_size
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    scores: dict[str, list[float]] = {"base": [], "original": [], "icm-lora": [], "sg-lora": []}
    for name in fitted.names:
        description = json.loads((folder / name / "card.json").read_text())["description"]
        pairs = read_pairs(folder / name / "test.jsonl")[:rows]
        scores["base"].append(_exact(model, tokenizer, pairs, max_tokens))
        texts = task_texts(description, [pair.prompt for pair in pairs])
        weights = {
            "icm-lora": fitted.icm_lora(last_states(model, tokenizer, texts).mean(0), None),
            "sg-lora": fitted.sg_lora(encoder.sentences([description])[0], None),
        }
        tuned = PeftModel.from_pretrained(model, folder / name)
        scores["original"].append(_exact(tuned, tokenizer, pairs, max_tokens))
        model = tuned.unload()
        for method, of_experts in weights.items():
            experts = [fitted.expert(i) for i in range(len(fitted.names))]
            config, tensors = weighted_sum(experts, of_experts.tolist(), str(directory))
            made = get_peft_model(model, LoraConfig(**config))
            set_peft_model_state_dict(made, tensors)
            scores[method].append(_exact(made.eval(), tokenizer, pairs, max_tokens))
            model = made.unload()
        typer.echo(f"{name:24}" + _row({arm: values[-1] for arm, values in scores.items()}))
    typer.echo(f"{'mean':24}" + _row({arm: sum(v) / len(v) for arm, v in scores.items()}))
    files = [folder / name / "adapter_model.safetensors" for name in fitted.names]
    n_bytes = sum(file.stat().st_size for file in files)
    typer.echo(f"storage {n_fitted:,} bytes of {n_bytes:,}: {n_fitted / n_bytes:.0%}")


def _row(scores: dict[str, float]) -> str:
    return "  ".join(f"{arm} {score:4.0%}" for arm, score in scores.items())


@torch.inference_mode()
def _exact(model: Any, tokenizer: Any, pairs: list[Example], max_tokens: int) -> float:
    """Return the share of greedy replies that equal the answers."""
    n_right = 0
    for pair in pairs:
        ids = torch.tensor([encode_task(tokenizer, pair.prompt)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
        reply = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        n_right += reply.strip() == pair.answer
    return n_right / len(pairs)


if __name__ == "__main__":
    typer.run(main)
