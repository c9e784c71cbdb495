"""Classifiers as transformers and PEFT make them, and whether a server's logits are theirs."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.conformance.judge import bound_of
from tests.conformance.load import Answer, Question

_N_LABELS = 3
_PAD = 0  # in no prompt
_MATTERS = 0.02
_ROUNDING = 2**-17  # of the largest logit, 64 units in the last place of float32
_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def with_head(model: Any, task: str) -> nn.Module:
    """transformers' classifier around the layers of ``model``, its head drawn at random."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = _N_LABELS, _PAD
    with torch.device("meta"):
        classifier = _CLASSES[task].from_config(config, dtype=torch.float32)
    classifier.model = model.model
    torch.manual_seed(0)
    classifier.score = nn.Linear(config.hidden_size, _N_LABELS, bias=task == "TOKEN_CLS")
    return classifier.eval()  # type: ignore[no-any-return]


def explain_head(
    model: Any, base: Any, questions: Sequence[Question], answers: Sequence[Answer]
) -> str | None:
    """Return None if all logits are right, else the problem.

    Unlike log-probabilities, logits may be large: their bound grows with the largest of them.
    ``base``: the model without the adapter, whose classes by the same head must be others; None:
    that is shown elsewhere.
    """
    for answer in answers:
        if answer.status != 200:
            return f"status {answer.status}: {answer.error}"
    prompts = [question.prompt for question in questions]
    together = _logits(model, prompts)
    found = [torch.tensor(answer.logits, dtype=torch.float64) for answer in answers]
    if [one.shape for one in found] != [one.shape for one in together]:
        return f"logits of {[tuple(one.shape) for one in found]}"
    if (
        base is not None
        and (matters := _largest(together, _by_base(model, base, prompts))) < _MATTERS
    ):
        return f"the adapter moves the logits by {matters:.1e} only: the row proves nothing"
    alone = [_logits(model, [prompt])[0] for prompt in prompts]
    off, moved = _largest(found, together), _largest(alone, together)
    largest = max(float(one.abs().max()) for one in together)
    if off <= max(bound_of(moved), _ROUNDING * largest):
        return None
    return f"logits are off by {off:.2e}; rounding explains {moved:.1e}"


def _logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """float64 [n_labels], or [n_tokens, n_labels]; one forward for all, padded on the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[_PAD] * (width - len(prompt))] for prompt in prompts])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=(ids != _PAD).long()).logits.double()
    if logits.dim() == 2:
        return list(logits)
    return [rows[: len(prompt)] for rows, prompt in zip(logits, prompts, strict=True)]


def _by_base(model: Any, base: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The trained head over the base's own hidden states."""
    head = model.base_model.model.score.modules_to_save["default"]
    with torch.inference_mode():
        logits = [
            head(base.model(input_ids=torch.tensor([prompt])).last_hidden_state[0]).double()
            for prompt in prompts
        ]
    return [
        rows if model.peft_config["default"].task_type == "TOKEN_CLS" else rows[-1]
        for rows in logits
    ]


def _largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
