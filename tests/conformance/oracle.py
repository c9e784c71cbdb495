"""Log-probabilities of transformers and PEFT along given tokens, with one base for all."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conformance.peft_row import PeftRow

Forward = Callable[[nn.Module, Tensor], Tensor]  # (the base's module, its input) → output


def load_base(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def save_short_base(path: Path, folder: Path, *, n_layers: int, n_tokens: int) -> Path:
    """Save the first layers and tokens of the model at ``path``, with the whole tokenizer."""
    config = AutoConfig.from_pretrained(path, num_hidden_layers=n_layers)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype="auto")
    model.resize_token_embeddings(n_tokens)
    model.save_pretrained(folder)
    for file in (*path.glob("tokenizer*"), *path.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


def sharing_copy(base: nn.Module, *, own: Sequence[int] = ()) -> Any:
    """New modules around the same tensors; the layers in ``own`` get tensors of their own."""
    apart = tuple(f".layers.{layer}." for layer in own)
    tensors = [*base.named_parameters(), *base.named_buffers()]
    memo = {id(t): t for name, t in tensors if not any(part in name for part in apart)}
    return copy.deepcopy(base, memo)


def make_peft(row: PeftRow, model: nn.Module, folder: Path) -> nn.Module:
    """The row's adapter on ``model``, which it keeps; trained at random and saved to ``folder``."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on configs
        config = row.config()
        if row.start is not None:
            row.start(model, config)
        tuned = peft.get_peft_model(model, config)
        if not row.keeps_start:
            row.train(tuned)
            tuned.save_pretrained(folder)
            return (
                tuned.eval() if row.task_id is None else _OfTask(tuned.eval(), row.task_id, folder)
            )
        kind = config.init_lora_weights
        config.init_lora_weights = True
        tuned.save_pretrained(folder / "initial")
        config.init_lora_weights = kind
        row.train(tuned)
        tuned.save_pretrained(
            folder, path_initial_model_for_weight_conversion=str(folder / "initial")
        )
    return tuned.eval()


class _OfTask(nn.Module):
    """A model of several tasks, asked for one; the saved config names it."""

    def __init__(self, model: nn.Module, task_id: int, folder: Path) -> None:
        super().__init__()
        self._model = model
        self._task_id = task_id
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "loraplex_task_id": task_id}))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        task_ids = torch.full(input_ids.shape[:1], self._task_id)
        return self._model(input_ids=input_ids, attention_mask=attention_mask, task_ids=task_ids)


def patched(base: PreTrainedModel, forwards: Mapping[str, Forward]) -> nn.Module:
    """The base with some modules computing a published formula instead."""
    model = sharing_copy(base)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, forward in forwards.items():
        module = modules[name]
        module.forward = lambda x, module=module, forward=forward: forward(module, x)
    return model


def logprobs_along(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return [prompt + answer − 1, vocab_size] for each prompt: every token after the first.

    One forward for all, padded on the right.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -width:]
        return [
            torch.log_softmax(row[: len(text) - 1].double(), dim=-1)
            for row, text in zip(logits, texts, strict=True)
        ]
