"""Measures what an FP8 KV cache costs in accuracy, emulated on a CPU in transformers.

    python -m kernels.benchmarks.fp8_cache [pages …]        the default base over the pages of docs

Keys and values are rounded as in ``--kv-cache-dtype fp8``, all else is float32. Prints the
perplexity with either cache, how often the most likely token agrees, and the KL divergence.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loraplex_server.model.loading.pull import resolve_model

_WINDOW, _N_WINDOWS = 512, 12
_PAGES = ("docs/architecture.md", "docs/how-it-works.md", "docs/families.md", "README.md")


class _Fp8Cache(DynamicCache):
    def update(
        self, k: Tensor, v: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rounded = [x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v)]
        both: tuple[Tensor, Tensor] = super().update(*rounded, *args, **kwargs)
        return both


@torch.inference_mode()
def main(pages: list[str]) -> None:
    path = resolve_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "".join(Path(page).read_text("utf-8") for page in pages or _PAGES)
    windows = torch.tensor(tokenizer(text)["input_ids"]).split(_WINDOW)[:_N_WINDOWS]
    losses, agreed, divergence = [0.0, 0.0], 0, 0.0
    for ids in windows:
        plain, fp8 = (
            model(ids[None], past_key_values=cache(), use_cache=True).logits[0].log_softmax(-1)
            for cache in (DynamicCache, _Fp8Cache)
        )
        for index, found in enumerate((plain, fp8)):
            losses[index] -= float(found[:-1].gather(1, ids[1:, None]).sum())
        agreed += int((plain.argmax(-1) == fp8.argmax(-1)).sum())
        divergence += float((plain.exp() * (plain - fp8)).sum())
    n = sum(len(ids) for ids in windows)
    perplexity, with_fp8 = (float(torch.tensor(x / (n - len(windows))).exp()) for x in losses)
    print(f"{n} tokens: perplexity {perplexity:.2f}, with fp8 {with_fp8:.2f}")
    print(f"the same most likely token {agreed / n:.1%}, KL divergence {divergence / n:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
