"""The flags of vLLM, and of other servers, in the options of this one.

A flag of the same meaning is renamed, a flag that has nothing to set here is left out with a note,
and other flags are refused with what to use instead. docs/coming-from.md lists them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .config import ConfigError


class Refusal(NamedTuple):
    instead: str
    harmless: tuple[str, ...] = ()  # values that ask for what this server does


# Flag → our option of the same meaning.
RENAMED: Mapping[str, str] = {
    "max-num-seqs": "max-batch-size",
    "max-num-batched-tokens": "max-step-tokens",
    "kv-cache-memory-bytes": "kv-memory",
    "enable-prefix-caching": "prefix-cache",
    "no-enable-prefix-caching": "no-prefix-cache",
    "enforce-eager": "no-cuda-graphs",
    "allowed-origins": "cors-origin",
    "otlp-traces-endpoint": "otlp-endpoint",
    "uvicorn-log-level": "log-level",
    # SGLang
    "model-path": "model",
    "lora-paths": "lora-modules",
    "max-loras-per-batch": "max-loras",
    "context-length": "max-model-len",
    "max-running-requests": "max-batch-size",
    "mem-fraction-static": "gpu-memory-utilization",
    "tp-size": "tensor-parallel-size",
    "disable-radix-cache": "no-prefix-cache",
    "disable-cuda-graph": "no-cuda-graphs",
    # LoRAX and TGI
    "model-id": "model",
    "max-total-tokens": "max-model-len",
    "max-active-adapters": "max-loras",
    "num-shard": "tensor-parallel-size",
}
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-q": "--quantization",
    "-pp": "--pipeline-parallel-size",
}
_SHORT |= {"-dp": "--data-parallel-size"}

# Flag, with N if it takes a value → why it has nothing to set here.
WITHOUT_EFFECT: Mapping[str, str] = {
    "enable-lora": "adapters are always served",
    "max-cpu-loras N": "host memory holds what fits --adapter-host-memory, a number of bytes",
    "lora-dtype N": "adapters keep the type of their files until they are loaded",
    "lora-extra-vocab-size N": "added tokens are served without a limit of their own",
    "fully-sharded-loras": "factors are split with their layer",
    "enable-auto-tool-choice": "tools are on",
    "tool-call-parser N": "the form of calls is read from the chat template",
    "reasoning-parser N": "the form of reasoning is read from the chat template",
    "enable-reasoning": "the form of reasoning is read from the chat template",
    "enable-chunked-prefill": "long prompts are always computed in chunks",
    "enable-prompt-tokens-details": "the usage always has cached_tokens",
    "enable-request-id-headers": "x-request-id is always answered",
    "trust-remote-code": "code of a checkpoint is never run",
    "disable-log-requests": "the log has no prompts",
    "disable-log-stats": "numbers are at /metrics, not in the log",
    "disable-frontend-multiprocessing": "HTTP and the engine share one process",
    "disable-uvicorn-access-log": "--log-level=warning hides the lines of requests",
    "guided-decoding-backend N": "llguidance compiles every grammar",
    "structured-outputs-config N": "llguidance compiles every grammar",
    "distributed-executor-backend N": "--tensor-parallel-size starts its own processes",
    "block-size N": "the size of KV pages is fixed",
    "swap-space N": "requests are never swapped out",
    "seed N": "a request without a seed draws its own",
}
REFUSED: Mapping[str, Refusal] = {
    "chat-template": Refusal("put chat_template.jinja into the folder of the model or the adapter"),
    "tokenizer": Refusal("the tokenizer is read from the folder of the model"),
    "revision": Refusal("download that revision to a folder, and give the folder as --model"),
    "download-dir": Refusal("the environment variable LORAPLEX_HOME names the folder of models"),
    "load-format": Refusal("only safetensors are read", ("auto", "safetensors")),
    "max-logprobs": Refusal(
        "at most 20 log-probabilities are answered", tuple(map(str, range(21)))
    ),
    "pipeline-parallel-size": Refusal("--tensor-parallel-size splits a model over GPUs", ("1",)),
    "data-parallel-size": Refusal("`loraplex cluster up` runs several engines", ("1",)),
    "scheduling-policy": Refusal("keys have a weight, see docs/fairness.md", ("fcfs",)),
    "generation-config": Refusal("the card of an adapter has defaults", ("vllm",)),
    "override-generation-config": Refusal("the card of an adapter has defaults for requests"),
    "speculative-config": Refusal(
        "there are no draft models; --drafts auto guesses next tokens from the text, which is the "
        "method ngram"
    ),
    "speculative-algorithm": Refusal(  # of SGLang
        "there are no draft models; --drafts auto guesses next tokens from the text", ("NGRAM",)
    ),
    "cpu-offload-gb": Refusal("weights stay on the device; --quantization int4 is smaller", ("0",)),
    "ssl-keyfile": Refusal("let a proxy end TLS, see docs/deployment.md"),
    "ssl-certfile": Refusal("let a proxy end TLS, see docs/deployment.md"),
    "root-path": Refusal("let a proxy strip the path, see docs/deployment.md"),
}
# Option → vLLM's value → ours. None: the option is left out, as the checkpoint says it.
_VALUES: Mapping[str, Mapping[str, str | None]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv-cache-dtype": {"fp8_e4m3": "fp8", "int8_per_token_head": "int8"},
    "attention-backend": {"FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"},
    "quantization": dict.fromkeys(
        ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors")
    ),
}
_LISTS = ("lora-modules", "served-model-name", "api-key")  # take several values at once
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def our_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line in our options, and a note for each flag that was left out.

    Words that belong to no flag of another server stay. Raises ConfigError for a refused flag.
    """
    ours: list[str] = []
    notes: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        match = _FLAG.fullmatch(_SHORT.get(word, word))
        if match is None:
            ours.append(word)
            continue
        flag, value = match[1].replace("_", "-"), match[2]
        name = RENAMED.get(flag, flag)
        if flag in WITHOUT_EFFECT:
            notes.append(f"--{flag} has no effect: {WITHOUT_EFFECT[flag]}")
            continue
        takes_value = f"{flag} N" in WITHOUT_EFFECT or flag in REFUSED or name in _VALUES
        if value is None and left and (takes_value or name == "cors-origin"):
            value = left.pop(0)
        if flag == "speculative-config" and _is_ngram(value):
            notes.append(f"--{flag} {value} has no effect: --drafts auto, the default, does it")
        elif f"{flag} N" in WITHOUT_EFFECT:
            notes.append(f"--{flag} {value} has no effect: {WITHOUT_EFFECT[f'{flag} N']}")
        elif flag in REFUSED:
            if value not in REFUSED[flag].harmless:
                raise ConfigError(f"--{flag} is no option of this server: {REFUSED[flag].instead}")
        elif value is None and name in _LISTS:
            for item in _items(name, left):
                ours += [f"--{name}", item]
        elif name == "cors-origin" and value is not None and value.startswith("["):
            ours += [f"--{name}={origin}" for origin in json.loads(value)]
        else:
            known = _VALUES.get(name, {})
            if value in known and known[value] is None:
                notes.append(f"--{flag} {value} has no effect: the checkpoint says so itself")
                continue
            value = known.get(value, value) if value is not None else None
            ours.append(f"--{name}" if value is None else f"--{name}={value}")
    return ours, notes


def _is_ngram(value: str | None) -> bool:
    """Return True for a JSON object with the method ngram, which guesses from the text."""
    try:
        config = json.loads(value or "")
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("method") == "ngram"


def advice(name: str) -> str | None:
    """Return what the option that another server calls ``name`` is here, or None."""
    flag = name.replace("_", "-")
    if flag in RENAMED:
        return f"it is called {RENAMED[flag]} here"
    if flag in REFUSED:
        return REFUSED[flag].instead
    return WITHOUT_EFFECT.get(flag) or WITHOUT_EFFECT.get(f"{flag} N")


def _items(name: str, left: list[str]) -> list[str]:
    """Take the values of a list from the words that are left: the first, and what is like it."""
    items = left[:1]
    del left[:1]
    while left and not left[0].startswith("-"):
        if name == "lora-modules" and not ("=" in left[0] or left[0].startswith("{")):
            break  # the model
        items.append(left.pop(0))
    return items
