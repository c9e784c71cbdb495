"""A text encoder as a base: what it serves, what it refuses, and sentence-transformers' files."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.conformance.load import put_upload
from tests.support.bases.tiny_encoders import save_tiny_encoder
from tests.vectors.conftest import Server, serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_QUERY = "the small cat sings"
_DOCUMENTS = ["a dog runs slowly over the bright moon", "cat", "the tree under a river"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder("bert", tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
async def encoder(
    bert: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Server]:
    async with serving(bert, tmp_path_factory.mktemp("state")) as running:
        yield running


def _reranker(base: Path, folder: Path, **fields: Any) -> torch.nn.Module:
    """A cross-encoder of one label: LoRA and head trained at random."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=1, ignore_mismatched_sizes=True
    )
    options = {"r": 4, "target_modules": ["query", "value", "dense"], **fields}
    tuned = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return tuned.eval()


@torch.no_grad()
def _pair_scores(model: torch.nn.Module, base: Path, **options: Any) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        float(model(**tokenizer(_QUERY, document, return_tensors="pt", **options)).logits[0, 0])
        for document in _DOCUMENTS
    ]


async def test_a_cross_encoder_reads_pairs_with_their_token_types(
    encoder: Server, bert: Path, tmp_path: Path
) -> None:
    model = _reranker(bert, tmp_path)
    await encoder.put("reranker", tmp_path)
    expected = _pair_scores(model, bert)
    data = await encoder.data(
        "/score", adapter="reranker", text_1=_QUERY, text_2=_DOCUMENTS, use_activation=False
    )
    assert [each["score"] for each in data] == pytest.approx(expected, abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    inputs = tokenizer(_QUERY, _DOCUMENTS[0], return_tensors="pt")
    inputs["token_type_ids"].zero_()
    with torch.no_grad():
        untyped = float(model(**inputs).logits[0, 0])
    assert abs(untyped - expected[0]) > 0.01  # the types matter
    answer = await encoder.post(
        "/rerank", adapter="reranker", query=_QUERY, documents=_DOCUMENTS, use_activation=False
    )
    best = sorted(range(3), key=lambda index: -expected[index])
    assert [result["index"] for result in answer.json()["results"]] == best


@pytest.mark.parametrize("n_tokens", [6, 9, 11])
@pytest.mark.parametrize("side", ["right", "left"])
async def test_a_truncated_pair_keeps_its_special_tokens(
    encoder: Server, bert: Path, tmp_path: Path, n_tokens: int, side: str
) -> None:
    model = _reranker(bert, tmp_path)
    await encoder.put("cut", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bert, truncation_side=side)
    with torch.no_grad():
        inputs = tokenizer(
            _QUERY, _DOCUMENTS[0], return_tensors="pt", truncation=True, max_length=n_tokens
        )
        expected = float(model(**inputs).logits[0, 0])
    (found,) = await encoder.data(
        "/score",
        adapter="cut",
        text_1=_QUERY,
        text_2=_DOCUMENTS[0],
        use_activation=False,
        truncate_prompt_tokens=n_tokens,
        truncation_side=side,
    )
    assert found["score"] == pytest.approx(expected, abs=1e-4)


async def test_the_bases_own_classifier_answers_without_an_adapter(
    encoder: Server, bert: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(bert)(_QUERY, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].softmax(-1)
    (found,) = await encoder.data("/classify", input=_QUERY)
    assert found["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found["label"] == ["no", "yes"][int(expected.argmax())]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
async def test_a_request_for_text_names_what_an_encoder_serves(
    encoder: Server, path: str, body: dict[str, Any]
) -> None:
    answer = await encoder.post(path, model="base", **body)
    assert answer.status_code == 400, answer.text
    assert "/v1/embeddings" in answer.text
    assert "text encoder" in answer.text


async def test_a_text_longer_than_the_positions_is_a_400(encoder: Server) -> None:
    answer = await encoder.post("/v1/embeddings", input="cat " * 70)
    assert answer.status_code == 400
    assert "72 tokens" in answer.text
    assert "64" in answer.text
    fitting = await encoder.post("/v1/embeddings", input="cat " * 62)
    assert fitting.status_code == 200


async def test_an_adapter_of_virtual_tokens_is_refused(
    encoder: Server, bert: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(bert, dtype=torch.float32)
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path)
    put = await put_upload(encoder.client, "virtual", tmp_path)
    assert put.status == 400
    assert "virtual tokens" in put.message


async def test_a_classifier_without_the_poolers_weights_is_refused(tmp_path: Path) -> None:
    """PEFT does not save a pooler that was drawn at random, so nobody has it."""
    base = save_tiny_encoder("bert", tmp_path / "base", bare=True)
    _without(base, "pooler")
    _reranker(base, tmp_path / "lost", target_modules=["query"])
    whole = _reranker(
        base, tmp_path / "whole", target_modules=["query"], modules_to_save=["classifier", "pooler"]
    )
    async with serving(base, tmp_path / "state") as server:
        put = await put_upload(server.client, "lost", tmp_path / "lost")
        assert put.status == 400
        assert "bert.pooler.dense" in put.message
        await server.put("whole", tmp_path / "whole")
        data = await server.data(
            "/score", adapter="whole", text_1=_QUERY, text_2=_DOCUMENTS, use_activation=False
        )
        found = [each["score"] for each in data]
        assert found == pytest.approx(_pair_scores(whole, base), abs=1e-4)
        answer = await server.post("/classify", input=_QUERY)
        assert answer.status_code == 400  # the base is no classifier
        assert answer.json()["error"]["code"] == "adapter_has_no_head"


def _without(base: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if part not in name}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("mode", ["cls", "mean", "max"])
@pytest.mark.parametrize("normalize", [False, True])
async def test_vectors_are_those_of_sentence_transformers(
    bert: Path, tmp_path: Path, mode: str, normalize: bool
) -> None:
    base = tmp_path / "sentences"
    base.mkdir()
    for path in bert.iterdir():
        (base / path.name).symlink_to(path)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    for index, kind in enumerate(kinds[1:], start=1):
        (base / f"{index}_{kind}").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode": mode}
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    texts = [_QUERY, *_DOCUMENTS]
    expected = SentenceTransformer(str(base), device="cpu").encode(texts)
    async with serving(base, tmp_path / "state") as server:
        data = await server.data("/v1/embeddings", input=texts)
    found = torch.tensor([each["embedding"] for each in data])
    assert float((found - torch.from_numpy(expected)).abs().max()) < 1e-4


@pytest.mark.slow
async def test_the_packaged_encoder_embeds_as_sentence_transformers_do(
    pulled_encoder: Path, tmp_path: Path
) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    parts = [Transformer(str(pulled_encoder)), Pooling(384, pooling_mode="mean"), Normalize()]
    texts = [_QUERY, "Kittens!", " ".join(_DOCUMENTS * 8)]
    expected = SentenceTransformer(modules=parts, device="cpu").encode(texts)
    async with serving(pulled_encoder, tmp_path / "state") as server:
        data = await server.data("/v1/embeddings", input=texts)
    found = torch.tensor([each["embedding"] for each in data])
    assert float((found - torch.from_numpy(expected)).abs().max()) < 1e-4


async def test_a_long_text_is_computed_whole_beside_others(bert: Path, tmp_path: Path) -> None:
    """A step of 8 tokens holds no text of 30, which gets a step of its own."""
    async with serving(bert, tmp_path / "alone", max_step_tokens=512) as server:
        texts = ["cat " * 28, "dog", "tree " * 5, "moon " * 40]
        expected = await server.data("/v1/embeddings", input=texts)
    async with serving(bert, tmp_path / "small", max_step_tokens=8) as server:
        found = await server.data("/v1/embeddings", input=texts)
    assert found == expected


async def test_an_encoder_refuses_options_of_decoders(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text encoder"):
        async with serving(bert, tmp_path, quantization="int8"):
            pass
