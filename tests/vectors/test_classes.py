"""Classes and scores over HTTP are those of the model that PEFT saved the adapter from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel, SharedEncoder
from tests.vectors.conftest import Server, Trained, serving

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::Warning")]

TEXTS = ["what a day", "no", "a rather longer text than the others, to be sure 123"]
_TOLERANCE = 1e-4  # logits reach 20


def _near(found: object, expected: torch.Tensor) -> None:
    assert torch.tensor(found).shape == expected.shape
    assert (torch.tensor(found) - expected).abs().max() < _TOLERANCE


async def test_a_text_has_the_classes_of_peft(
    server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    names = {"0": "good", "1": "bad", "2": "other"}
    adapter = train("SEQ_CLS", files={"config.json": {"id2label": names}})
    card = await server.put("mood", adapter.folder, description="Tells moods")
    assert card["task"] == "SEQ_CLS"
    answer = (await server.post("/classify", model="mood", input=TEXTS)).json()
    for item, text in zip(answer["data"], TEXTS, strict=True):
        logits = adapter.logits(tokenizer(text)["input_ids"])
        _near(item["probs"], logits.softmax(-1))
        assert item["label"] == names[str(int(logits.argmax()))]
        assert item["num_classes"] == 3
    assert answer["adapter"]["digest"] == card["digest"]
    raw = await server.data("/classify", adapter="mood", input=TEXTS, use_activation=False)
    expected = [adapter.logits(tokenizer(text)["input_ids"]) for text in TEXTS]
    _near([item["probs"] for item in raw], torch.stack(expected))
    pooled = await server.data("/pooling", model="mood", input=TEXTS)
    assert [item["data"] for item in pooled] == [item["probs"] for item in answer["data"]]


async def test_messages_have_a_class_too(
    server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    adapter = train("SEQ_CLS")
    await server.put("judge", adapter.folder)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    (found,) = await server.data("/classify", model="judge", messages=messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    _near(found["probs"], adapter.logits(ids).softmax(-1))


async def test_each_token_has_the_classes_of_peft(
    server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    adapter = train("TOKEN_CLS", n_labels=4)
    assert (await server.put("tagger", adapter.folder))["task"] == "TOKEN_CLS"
    data = await server.data("/pooling", model="tagger", input=TEXTS)
    for item, text in zip(data, TEXTS, strict=True):
        _near(item["data"], adapter.logits(tokenizer(text)["input_ids"]).softmax(-1))


@pytest.mark.parametrize(
    ("problem", "n_labels", "act"),
    [
        ("multi_label_classification", 3, torch.sigmoid),
        ("regression", 1, lambda logits: logits),
        (None, 1, torch.sigmoid),
    ],
)
async def test_probabilities_follow_the_kind_of_problem(
    problem: str | None,
    n_labels: int,
    act: Callable[[torch.Tensor], torch.Tensor],
    server: Server,
    train: Callable[..., Trained],
    tokenizer: Any,
) -> None:
    files = {"config.json": {"problem_type": problem}}
    adapter = train("SEQ_CLS", n_labels=n_labels, files=files)
    await server.put(f"problem-{problem}", adapter.folder)
    (found,) = await server.data("/classify", model=f"problem-{problem}", input=TEXTS[0])
    _near(found["probs"], act(adapter.logits(tokenizer(TEXTS[0])["input_ids"])))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 16},
        {"target_modules": "all-linear"},
        {"bias": "all"},
        {"modules_to_save": ["score", "input_layernorm"]},
        {"trainable_token_indices": [3, 5, 60]},
    ],
    ids=str,
)
async def test_heads_stand_beside_every_form_of_lora(
    fields: dict[str, object], server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    adapter = train("SEQ_CLS", seed=4, **fields)
    await server.put("form", adapter.folder)
    data = await server.data("/classify", model="form", input=TEXTS, use_activation=False)
    expected = [adapter.logits(tokenizer(text)["input_ids"]) for text in TEXTS]
    _near([item["probs"] for item in data], torch.stack(expected))


@pytest.mark.parametrize("kind", ["ia3", "prompt", "loha"])
async def test_heads_stand_beside_other_methods(
    kind: str, server: Server, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from peft import IA3Config, LoHaConfig, PromptTuningConfig

    config: Any = {
        "ia3": IA3Config(
            task_type="SEQ_CLS",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
        "loha": LoHaConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]),
    }[kind]
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = None
    peft = get_peft_model(model.float(), config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad and "score" not in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    peft.save_pretrained(tmp_path / "adapter")
    await server.put(f"head-{kind}", tmp_path / "adapter")
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        logits = peft(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0]
    (found,) = await server.data(
        "/classify", model=f"head-{kind}", input=TEXTS[0], use_activation=False
    )
    _near(found["probs"], logits)


async def test_a_cross_encoder_scores_pairs_as_its_model_does(
    server: Server, train: Callable[..., Trained], tokenizer: Any
) -> None:
    adapter = train("SEQ_CLS", n_labels=1)
    await server.put("ranker", adapter.folder)
    query, documents = "which fox", ["the quick brown fox", "a stock", "12"]
    expected = torch.tensor(
        [float(adapter.logits(tokenizer(query, one)["input_ids"]).sigmoid()) for one in documents]
    )
    for path in ("/score", "/v1/score"):
        data = await server.data(path, model="ranker", text_1=query, text_2=documents)
        _near([item["score"] for item in data], expected)
    pairs = {"queries": [query] * 3, "documents": documents}
    data = await server.data("/score", model="ranker", **pairs)
    _near([item["score"] for item in data], expected)
    order = expected.argsort(descending=True)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = await server.post(
            path, model="ranker", query=query, documents=["", *documents][1:], top_n=2
        )
        results = answer.json()["results"]
        assert [one["index"] for one in results] == order[:2].tolist()
        assert [one["document"]["text"] for one in results] == [documents[i] for i in order[:2]]
        _near([one["relevance_score"] for one in results], expected[order[:2]])


async def test_without_a_head_a_score_is_the_cosine(
    server: Server, base: Path, tokenizer: Any
) -> None:
    model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    first, second = "which fox", ["the quick brown fox", "a stock"]
    with torch.no_grad():
        means = [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
            .last_hidden_state[0]
            .mean(0)
            for text in (first, *second)
        ]
    expected = [torch.cosine_similarity(means[0], mean, dim=0) for mean in means[1:]]
    data = await server.data("/score", text_1=first, text_2=second)
    _near([item["score"] for item in data], torch.stack(expected))
    documents = [{"text": text} for text in second]
    ranked = (await server.post("/rerank", query=first, documents=documents)).json()["results"]
    assert [one["relevance_score"] for one in ranked] == sorted(
        (item["score"] for item in data), reverse=True
    )


async def test_an_adapter_without_the_head_is_refused(
    server: Server, train: Callable[..., Trained]
) -> None:
    await server.put("plain", train("FEATURE_EXTRACTION").folder)
    await server.put("mood", train("SEQ_CLS").folder)
    await server.put("tagger", train("TOKEN_CLS").folder)
    for path, body in (
        ("/classify", {"input": "x"}),
        ("/classify", {"input": "x", "model": "plain"}),
        ("/classify", {"input": "x", "model": "tagger"}),
        ("/pooling", {"input": "x", "model": "plain", "task": "classify"}),
        ("/pooling", {"input": "x", "model": "mood", "task": "token_classify"}),
        ("/score", {"text_1": "x", "text_2": "y", "model": "mood"}),
        ("/rerank", {"query": "x", "documents": ["y"], "model": "tagger"}),
    ):
        answer = await server.post(path, **body)
        assert answer.status_code == 400, (path, body, answer.text)
        assert answer.json()["error"]["code"] == "adapter_has_no_head"
    mixture = [{"name": "plain", "weight": 1}, {"name": "mood", "weight": 1}]
    assert (await server.post("/classify", input="x", adapter=mixture)).status_code == 400


async def test_a_classifier_writes_no_text(server: Server, train: Callable[..., Trained]) -> None:
    await server.put("mood", train("SEQ_CLS").folder)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "adapter": "mood", "model": "base"}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        answer = await server.post(path, **{"model": "mood", **body})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == "adapter_is_classifier"
        assert "/classify" in error["message"]


async def test_the_sentence_encoder_is_a_model_of_its_own(
    base: Path, tmp_path: Path, pulled_encoder: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    oracle = SentenceTransformer(
        modules=[Transformer(str(pulled_encoder)), Pooling(384, "mean"), Normalize()], device="cpu"
    )
    oracle.max_seq_length = 256  # as sentence_bert_config.json says
    texts = ["a cat", "the stock market fell by three percent " * 4, "kittens sleep"]
    encoder = EncoderModel.of("minilm", pulled_encoder, SharedEncoder(lambda: pulled_encoder))
    async with serving(base, tmp_path / "state", encoder=encoder) as server:
        shown = (await server.client.get("/v1/models/minilm")).json()
        assert shown["max_model_len"] == 256
        listed = (await server.client.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == ["base", "minilm"]
        answer = (await server.post("/v1/embeddings", model="minilm", input=texts)).json()
        vectors = torch.from_numpy(oracle.encode(texts))
        _near([item["embedding"] for item in answer["data"]], vectors)
        n_tokens = sum(len(oracle.tokenizer(text)["input_ids"]) for text in texts)
        assert answer["usage"]["prompt_tokens"] == n_tokens
        scores = await server.data("/score", model="minilm", text_1=texts[0], text_2=texts[1:])
        _near([item["score"] for item in scores], vectors[1:] @ vectors[0])
        long = "cat " * 300
        refused = await server.post("/v1/embeddings", model="minilm", input=long)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        cut = {"truncate_prompt_tokens": -1}
        (whole,) = await server.data("/v1/embeddings", model="minilm", input=long, **cut)
        _near(whole["embedding"], torch.from_numpy(oracle.encode([long])[0]))
        for path, body in (
            ("/classify", {"input": "x"}),
            ("/v1/embeddings", {"input": [1, 2]}),
            ("/v1/embeddings", {"input": "x", "adapter": "a"}),
            ("/v1/embeddings", {"input": "x", "add_special_tokens": False}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": "x"}]}),
            ("/pooling", {"input": "x", "task": "token_embed"}),
            ("/v1/completions", {"prompt": "x"}),
        ):
            answer = await server.post(path, model="minilm", **body)
            assert isinstance(answer, httpx.Response)
            assert answer.status_code == 400, (path, body, answer.text)
