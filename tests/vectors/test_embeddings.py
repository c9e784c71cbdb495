"""Embeddings over HTTP are those of transformers and of sentence-transformers itself."""

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from tests.vectors.conftest import Server, Trained, serving

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::Warning")]

TEXTS = ["the quick brown fox", "hello", "a rather longer text than the others, to be sure 123"]
MODES = ["mean", "lasttoken", "cls", "max", "weightedmean", "mean_sqrt_len_tokens"]
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return AutoModel.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def _mean(model: Any, ids: list[int]) -> Tensor:
    hidden: Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=-1)


def _near(found: object, expected: object) -> None:
    found, expected = torch.tensor(np.array(found)), torch.tensor(np.array(expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < _TOLERANCE


async def test_of_the_base_they_are_the_normalised_mean(
    server: Server, plain: Any, tokenizer: Any
) -> None:
    answer = (await server.post("/v1/embeddings", model="base", input=TEXTS)).json()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    for item, one in zip(answer["data"], ids, strict=True):
        _near(item["embedding"], _mean(plain, one))
    n_tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert answer["adapter"] is None


async def test_texts_and_token_ids_are_the_same_input(server: Server, tokenizer: Any) -> None:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    texts = await server.data("/v1/embeddings", input=TEXTS)
    assert await server.data("/v1/embeddings", input=ids) == texts
    for one, text, expected in zip(ids, TEXTS, texts, strict=True):
        for given in (text, one, [text], [one]):
            (alone,) = await server.data("/v1/embeddings", input=given)
            assert alone["embedding"] == expected["embedding"]  # the very bits


async def test_the_openai_client_gets_base64_and_dimensions(
    server: Server, plain: Any, tokenizer: Any
) -> None:
    client = openai.AsyncOpenAI(
        base_url="http://127.0.0.1/v1",
        api_key="-",
        http_client=httpx.AsyncClient(transport=server.client._transport),
    )
    floats = await client.embeddings.create(model="base", input=TEXTS, encoding_format="float")
    decoded = await client.embeddings.create(model="base", input=TEXTS)  # asks for base64
    short = await client.embeddings.create(model="base", input=TEXTS, dimensions=5)
    for a, b, c in zip(floats.data, decoded.data, short.data, strict=True):
        assert np.float32(a.embedding).tolist() == b.embedding
        cut = torch.tensor(a.embedding[:5])
        _near(c.embedding, cut / cut.norm())
    raw = (await server.data("/v1/embeddings", input="hello", encoding_format="base64"))[0]
    vector = np.frombuffer(base64.b64decode(raw["embedding"]), dtype="<f4")
    _near(vector, _mean(plain, tokenizer("hello")["input_ids"]))


async def test_messages_are_rendered_by_the_template(
    server: Server, plain: Any, tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (found,) = await server.data("/v1/embeddings", messages=messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    _near(found["embedding"], _mean(plain, tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize(("side", "part"), [(None, slice(0, 4)), ("left", slice(-4, None))])
async def test_long_texts_are_cut_where_that_is_asked(
    server: Server, side: str | None, part: slice, tokenizer: Any
) -> None:
    ids = tokenizer(TEXTS[2])["input_ids"]
    cut = {"truncate_prompt_tokens": 4, "truncation_side": side}
    (found,) = await server.data("/v1/embeddings", input=TEXTS[2], **cut)
    (expected,) = await server.data("/v1/embeddings", input=ids[part])
    assert found["embedding"] == expected["embedding"]


@pytest.fixture(scope="module")
def sentence_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as sentence-transformers wants it: it pads, and would use the chat template."""
    folder = tmp_path_factory.mktemp("sentences") / "base"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.pad_token = None, tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def _sentence_model(folder: Path, mode: str, *, normalize: bool) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules = [Transformer(str(folder)), Pooling(64, mode)]
    return SentenceTransformer(modules=[*modules, *([Normalize()] * normalize)], device="cpu")


@pytest.mark.parametrize(
    ("mode", "normalize"), [*((mode, True) for mode in MODES), ("lasttoken", False)]
)
async def test_an_adapter_s_own_files_pool_as_sentence_transformers(
    mode: str, normalize: bool, server: Server, sentence_base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = _sentence_model(sentence_base, mode, normalize=normalize)
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=targets)
    peft = get_peft_model(model[0].model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "saved"))
    peft.save_pretrained(tmp_path / "adapter")
    for name in ("modules.json", "1_Pooling/config.json"):
        (tmp_path / "adapter" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(tmp_path / "saved" / name, tmp_path / "adapter" / name)
    name = f"sentences-{mode}-{normalize}"
    await server.put(name, tmp_path / "adapter")
    expected = model.encode(TEXTS)
    found = await server.data("/v1/embeddings", model=name, input=TEXTS)
    _near([item["embedding"] for item in found], expected)
    other = await server.data("/v1/embeddings", model=name, input=TEXTS, use_activation=True)
    _near(np.linalg.norm([item["embedding"] for item in other], axis=-1), np.ones(3))


async def test_a_base_s_own_files_pool_as_sentence_transformers(
    sentence_base: Path, tmp_path: Path
) -> None:
    model = _sentence_model(sentence_base, "lasttoken", normalize=True)
    expected = model.encode(TEXTS)
    base = tmp_path / "base"
    shutil.copytree(sentence_base, base)
    model.save_pretrained(str(tmp_path / "saved"))
    shutil.copyfile(tmp_path / "saved" / "modules.json", base / "modules.json")
    shutil.copytree(tmp_path / "saved" / "1_Pooling", base / "1_Pooling")
    async with serving(base, tmp_path / "state") as server:
        found = await server.data("/v1/embeddings", input=TEXTS)
    _near([item["embedding"] for item in found], expected)


async def test_without_files_an_adapter_pools_as_the_base_does(
    server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    adapter = train("FEATURE_EXTRACTION")
    await server.put("features", adapter.folder)
    data = await server.data("/v1/embeddings", model="base", adapter="features", input=TEXTS)
    for item, text in zip(data, TEXTS, strict=True):
        hidden = adapter.hidden(tokenizer(text)["input_ids"])
        _near(item["embedding"], torch.nn.functional.normalize(hidden.mean(0), dim=-1))


async def test_a_mixture_has_vectors_too(
    server: Server, train: Callable[..., Trained], plain: Any, tokenizer: Any, base: Path
) -> None:
    """Half of one adapter and twice another, as PEFT's add_weighted_adapter makes it."""
    from peft import PeftModel

    for seed in (1, 2):
        await server.put(f"part-{seed}", train("FEATURE_EXTRACTION", seed=seed).folder)
    mixed = PeftModel.from_pretrained(
        AutoModel.from_pretrained(base, dtype=torch.float32),
        str(train("FEATURE_EXTRACTION", seed=1).folder),
        adapter_name="a",
    )
    mixed.load_adapter(str(train("FEATURE_EXTRACTION", seed=2).folder), adapter_name="b")
    mixed.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mixed", combination_type="cat")
    mixed.set_adapter("mixed")
    mixture = [{"name": "part-1", "weight": 0.5}, {"name": "part-2", "weight": 2.0}]
    (found,) = await server.data("/v1/embeddings", adapter=mixture, input=TEXTS[0])
    _near(found["embedding"], _mean(mixed.eval(), tokenizer(TEXTS[0])["input_ids"]))


async def test_rows_of_each_token(server: Server, plain: Any, tokenizer: Any) -> None:
    (found,) = await server.data(
        "/pooling", input=TEXTS[0], task="token_embed", use_activation=False
    )
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        hidden = plain(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert found["object"] == "pooling"
    assert (torch.tensor(found["data"]) - hidden).abs().max() < 1e-4
    (unit,) = await server.data("/pooling", input=TEXTS[0], task="token_embed")
    _near(np.linalg.norm(unit["data"], axis=-1), np.ones(len(ids)))
    (pooled,) = await server.data("/pooling", input=TEXTS[0])
    (embedded,) = await server.data("/v1/embeddings", input=TEXTS[0])
    assert pooled["data"] == embedded["embedding"]
