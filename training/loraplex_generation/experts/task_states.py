"""Task vectors off the server: hidden states of a transformers model, as ICM-LoRA reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_task(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenise a user's message as a chat, or as plain text if the base has no chat template."""
    is_chat = bool(tokenizer.chat_template)
    if is_chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=not is_chat).ids)


@torch.inference_mode()
def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> Tensor:
    """Return the final hidden state of each text's last token, float32 [n_texts, hidden_size]."""
    states = []
    for text in texts:
        ids = torch.tensor([encode_task(tokenizer, text)], device=model.device)
        states.append(model.base_model(input_ids=ids).last_hidden_state[0, -1].float().cpu())
    return torch.stack(states)
