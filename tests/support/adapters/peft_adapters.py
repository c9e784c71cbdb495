"""Random adapters of any PEFT config, as PEFT's own model and as the store reads them."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from tests.support.adapters.round_trip import randomise
from tests.support.bases.tiny_models import read_path


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter: PEFT's ``model`` is the oracle of the served ``plan``."""

    model: Any  # PEFT's
    plan: AdapterPlan

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], n_tokens: int) -> tuple[list[int], list[float]]:
        """Return greedy ids and their log-probabilities, by one forward a token without a cache."""
        ids, logprobs = list(prompt), []
        for _ in range(n_tokens):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            token = int(logits.argmax())
            logprobs.append(float(torch.log_softmax(logits, -1)[token]))
            ids.append(token)
        return ids[len(prompt) :], logprobs


def peft_adapter(
    model: PreTrainedModel,
    config: peft.PeftConfig,
    folder: Path,
    *,
    std: float = 0.2,
    seed: int = 1,
) -> PeftAdapter:
    """Make an adapter on a copy of ``model``. PEFT saves to ``folder``, the store reads there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(copy.deepcopy(model), config)
        randomise(tuned, std, seed)
        tuned.eval()
        tuned.save_pretrained(folder)
    return PeftAdapter(tuned, read_path(folder, model).plan)
