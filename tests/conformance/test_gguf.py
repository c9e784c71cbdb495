"""GGUF files over HTTP: each answers as transformers and PEFT on gguf-py's dequantised weights."""

import asyncio
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from loraplex_server.model.gguf.gguf_model import load_gguf
from loraplex_server.model.loading.pull import resolve_model
from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.judge import difference, explain
from tests.conformance.load import Answer, Question, ask_alone_and_together
from tests.conformance.oracle import load_base, logprobs_along, make_peft, sharing_copy
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving
from tests.support.bases.gguf_checkpoint import save_as_gguf
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_T = GGMLQuantizationType
_BASES = {row.id: row for row in BASE_ROWS}
_PROMPTS = tuple(
    tuple(torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (7, 40)
)
# An activation in eight bits is off by up to 1/254 of the largest of its 32.
_MOST_IN_EIGHT_BITS = 0.15


def _mixed(name: str) -> GGMLQuantizationType:
    """A type for each kind of matrix, as files come."""
    kinds = {"v_proj": _T.Q8_0, "down_proj": _T.Q5_0, "o_proj": _T.Q4_1, "up_proj": _T.IQ4_NL}
    kinds |= {"embed_tokens": _T.Q8_0, "lm_head": _T.Q5_1, "k_proj": _T.F16}
    return kinds.get(name.split(".")[-2], _T.Q4_0)


def _k_types(name: str) -> GGMLQuantizationType:
    kinds = {"v_proj": _T.Q6_K, "down_proj": _T.Q6_K, "o_proj": _T.Q5_K, "gate_proj": _T.Q3_K}
    kinds |= {"embed_tokens": _T.Q6_K, "up_proj": _T.IQ4_XS}
    return kinds.get(name.split(".")[-2], _T.Q4_K)


def _q8_0(_: str) -> GGMLQuantizationType:
    return _T.Q8_0


def _q4_0(_: str) -> GGMLQuantizationType:
    return _T.Q4_0


def _q4_1(_: str) -> GGMLQuantizationType:
    return _T.Q4_1


@dataclass(frozen=True)
class _Case:
    base_id: str
    type_of: Callable[[str], GGMLQuantizationType] = _q8_0
    config: dict[str, Any] = field(default_factory=dict)
    adapted: str = ""  # a key of ``_ADAPTERS``

    def save(self, folder: Path) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
        """The file, the model before it was quantised, and that of the file's weights."""
        row = _BASES[self.base_id]
        path = save_base(replace(row, config={**row.config, **self.config}), folder)
        plain, base = load_base(path), load_base(path)
        file = folder / "tiny.gguf"
        save_as_gguf(base, tiny_tokenizer(), file, self.type_of)
        return file, plain, base


_WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
_SERVED = {
    "llama, mixed": _Case("llama", _mixed, adapted="linears"),
    "llama, K types, tied": _Case("llama-tied", _k_types, _WIDE, adapted="linears"),
    "llama, Q4_0, scaled as Llama 3": _Case(
        "llama-rope-llama3",
        _q4_0,
        {
            "rope_parameters": {
                **_BASES["llama-rope-llama3"].config["rope_parameters"],
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama, yarn": _Case("llama-rope-yarn"),
    "qwen2": _Case("qwen2", _q4_1),
    "qwen3": _Case("qwen3", _q4_0),
    "mixtral, mixed": _Case("mixtral", _mixed, adapted="experts"),
    "qwen3-moe": _Case(
        "qwen3-moe", _q4_0, {"moe_intermediate_size": 64, "norm_topk_prob": True}, adapted="experts"
    ),
    "olmoe": _Case("olmoe", _q4_1, {"clip_qkv": 1.5}, adapted="experts"),
    "smollm3": _Case("smollm3", config={"no_rope_layer_interval": 4, "num_hidden_layers": 4}),
    "granite": _Case("granite", _q4_0),
    "phi3": _Case("phi3", config={"sliding_window": None}),
    "gemma": _Case("gemma"),
    "gemma2": _Case("gemma2", config={"query_pre_attn_scalar": 16}),
    "gemma3": _Case("gemma3", config={"query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
}
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_OF_LINEARS = (
    PeftRow("lora", lambda: LoraConfig(r=4, target_modules=_LINEARS), moved(0.1)),
    PeftRow("dora", lambda: LoraConfig(r=4, use_dora=True, target_modules=_LINEARS), moved(0.1)),
    PeftRow(
        "pissa",
        lambda: LoraConfig(r=4, init_lora_weights="pissa", target_modules=_LINEARS),
        moved(0.1),
        keeps_start=True,
        rewrites_base=True,
    ),
    PeftRow(
        "of-head-and-embedding",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"]),
        moved(0.1),
    ),
)
_OF_EXPERTS = (
    PeftRow(
        "lora",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=_EXPERTS),
        moved(0.1),
    ),
    PeftRow(
        "of-down",
        lambda: LoraConfig(r=4, target_modules=[], target_parameters=_EXPERTS[1:]),
        moved(0.1),
    ),
)
_ADAPTERS = {"linears": _OF_LINEARS, "experts": _OF_EXPERTS}


@pytest.mark.parametrize("case", _SERVED.values(), ids=_SERVED)
def test_a_gguf_file_answers_as_its_dequantised_weights(
    case: _Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing but weights is rounded."""
    torch.set_num_threads(1)
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    file, plain, base = case.save(tmp_path / "base")
    oracles: dict[str, nn.Module] = {"": base}
    for row in _ADAPTERS.get(case.adapted, ()):
        own = copy.deepcopy(base) if row.rewrites_base else sharing_copy(base)
        oracles[row.id] = make_peft(row, own, tmp_path / row.id)
    alone, together = asyncio.run(_serve(file, tmp_path, list(oracles)[1:], "float32"))
    problems = []
    for name, model in oracles.items():
        for prompt, answer in zip(_PROMPTS, together[name], strict=True):
            # the plain weights must not explain the base's answers, nor the base an adapter's
            other = base if name else plain
            problem = explain(model, other, [Question(prompt, echo=True)], [answer])
            problems += [] if problem is None else [f"{name or 'base'}: {problem}"]
    assert problems == []
    if case.adapted != "experts":  # the last bits of a router's product depend on the batch
        assert together[""] == alone  # to the bit, whoever shares the steps


def test_in_bfloat16_activations_are_rounded_to_eight_bits_and_base_rows_keep_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    case = _SERVED["llama, mixed"]
    file, _, base = case.save(tmp_path / "base")
    tuned = make_peft(_OF_LINEARS[0], sharing_copy(base), tmp_path / "lora")
    alone, together = asyncio.run(_serve(file, tmp_path, ["lora"], "bfloat16"))
    assert together[""] == alone
    for name, model in (("", base), ("lora", tuned)):
        for prompt, answer in zip(_PROMPTS, together[name], strict=True):
            (expected,) = logprobs_along(model, [prompt], [answer.token_ids])
            assert difference(Question(prompt, echo=True), answer, expected) < _MOST_IN_EIGHT_BITS


def test_other_devices_get_plain_stacks_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    file, _, base = _SERVED["mixtral, mixed"].save(tmp_path / "base")
    folder = resolve_model(str(file))
    model = load_gguf(file, folder, dtype=torch.float32, device=torch.device("cuda"))
    for (name, ours), theirs in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_folder_of_a_file_has_its_tokenizer_and_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    file, _, _ = _SERVED["qwen2"].save(tmp_path / "base")
    folder = resolve_model(str(file))
    assert folder == resolve_model(str(file))
    ours, theirs = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    chat = [{"role": "user", "content": "Grüße, 你好 12 times  <|im_end|>"}]
    given, expected = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for tokenizer in (ours, theirs)
    )
    assert given == expected
    assert ours.decode(given) == theirs.decode(expected)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [theirs.eos_token_id]


async def _serve(
    file: Path, folder: Path, names: list[str], dtype: str
) -> tuple[list[Answer], dict[str, list[Answer]]]:
    """Return the base's answers alone, and all answers together, by adapter; "": the base."""
    base = resolve_model(str(file))
    async with serving(base, folder / "state", dtype=dtype) as client:
        return await ask_alone_and_together(client, folder, names, _PROMPTS)
