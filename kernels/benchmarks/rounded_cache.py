"""Measures what a KV cache in fp8 or int8 costs in accuracy, emulated on a CPU in transformers.

    python -m kernels.benchmarks.rounded_cache fp8                        12 texts of 512 tokens
    python -m kernels.benchmarks.rounded_cache int8 --tokens 8192 --texts 2

The default base reads the pages of docs. Keys and values are rounded as with ``--kv-cache-dtype``,
all else is float32. Prints the perplexity with either cache, how often the most likely token
agrees, the KL divergence, and the mean and the largest change of a token's log-probability.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loraplex_kernels.formats.int8_cache import to_codes
from loraplex_server.model.loading.pull import resolve_model

_FIRST_PAGES = ("docs/architecture.md", "docs/how-it-works.md", "docs/families.md", "README.md")
_CHUNK = 512  # tokens whose logits are in memory


def _as_fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def _as_int8(x: Tensor) -> Tensor:
    codes, scales = to_codes(x)
    return codes * scales.float().unsqueeze(-1)


_ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {"fp8": _as_fp8, "int8": _as_int8}


class _RoundedCache(DynamicCache):
    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounding = rounding

    def update(
        self, k: Tensor, v: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = super().update(
            self._rounding(k), self._rounding(v), *args, **kwargs
        )
        return both


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dtype", choices=_ROUNDINGS)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each text")
    parser.add_argument("--texts", type=int, default=12)
    options = parser.parse_args()
    path = resolve_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pages = [*_FIRST_PAGES, *sorted({*map(str, Path("docs").glob("*.md"))} - {*_FIRST_PAGES})]
    text = "".join(Path(page).read_text("utf-8") for page in pages)
    texts = torch.tensor(tokenizer(text)["input_ids"]).split(options.tokens)[: options.texts]
    n_tokens = sum(len(ids) for ids in texts)
    losses, agreed, divergence = [0.0, 0.0], 0, 0.0
    changes: list[Tensor] = []  # of the log-probability of each token
    for ids in texts:
        states = [
            model.model(ids[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
            for cache in (DynamicCache(), _RoundedCache(_ROUNDINGS[options.dtype]))
        ]
        for start in range(0, len(ids) - 1, _CHUNK):
            following = ids[start + 1 : start + 1 + _CHUNK, None]
            plain, rounded = (
                model.lm_head(state[start : start + len(following)]).log_softmax(-1)
                for state in states
            )
            of_tokens = [found.gather(1, following)[:, 0] for found in (plain, rounded)]
            for index, found in enumerate(of_tokens):
                losses[index] -= float(found.sum())
            changes.append((of_tokens[1] - of_tokens[0]).abs())
            agreed += int((plain.argmax(-1) == rounded.argmax(-1)).sum())
            divergence += float((plain.exp() * (plain - rounded)).sum())
    change = torch.cat(changes)
    n = len(change)
    perplexities = [float(torch.tensor(loss / n).exp()) for loss in losses]
    print(
        f"{n_tokens} tokens in texts of {options.tokens}: perplexity {perplexities[0]:.3f}, "
        f"with {options.dtype} {perplexities[1]:.3f}"
    )
    print(f"the same most likely token {agreed / n:.1%}, KL divergence {divergence / n:.5f}")
    print(
        f"change of a token's log-probability: mean {float(change.mean()):.4f}, "
        f"99 % below {float(change.quantile(0.99)):.3f}, largest {float(change.max()):.3f}"
    )


if __name__ == "__main__":
    main()
