"""SG-LoRA over HTTP on a CLIP, whose own tower of texts reads the descriptions of the experts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from typer.testing import CliRunner

from loraplex_generation.experts.fitted import EXPERTS_FILE, FittedExperts
from loraplex_server.cli.app import app
from research.few_shot.drawings import KNOWN, drawing
from research.few_shot.drawn_clip import save_drawn_clip
from tests.support.bases.tiny_image_encoders import data_url
from tests.support.servers.server_process import server_process

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DESCRIPTIONS = [
    f"a photo of a {label}." for label in ("red circle", "red ring", "blue bar", "green bar", "two")
]
LABELS = ["red ring", "blue ring", "three"]


class Peft:
    """The base with every expert, in PEFT."""

    def __init__(self, base: Path) -> None:
        torch.manual_seed(0)
        self.base = base
        self.model: Any = CLIPModel.from_pretrained(base).eval()
        for i in range(len(DESCRIPTIONS)):
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
            if i == 0:
                self.model = peft.get_peft_model(self.model, config, "expert0")
            else:
                self.model.add_adapter(f"expert{i}", config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))

    @torch.no_grad()
    def weights(self, sentence: str) -> dict[str, float]:
        """Return SG-LoRA's: a softmax over the cosines of the four nearest descriptions."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        tokens = tokenizer([sentence, *DESCRIPTIONS], padding=True, return_tensors="pt")
        with self.model.disable_adapter():
            features = self.model.get_text_features(**tokens).pooler_output
        vectors = torch.nn.functional.normalize(features, dim=-1)
        top = (vectors[1:] @ vectors[0]).topk(4)
        alpha = (top.values / 0.05).softmax(0).tolist()
        return {f"expert{i}": w for i, w in zip(top.indices.tolist(), alpha, strict=True)}

    @torch.no_grad()
    def probabilities(self, images: list[Any], adapter: str) -> torch.Tensor:
        self.model.set_adapter(adapter)
        tokens = AutoTokenizer.from_pretrained(self.base)(LABELS, padding=True, return_tensors="pt")
        processor = AutoImageProcessor.from_pretrained(self.base, backend="pil")
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        logits: torch.Tensor = self.model(pixel_values=pixels, **tokens).logits_per_image
        return logits.softmax(-1)


class Served:
    def __init__(self, http: httpx.Client, oracle: Peft, state: Path, generators: Path) -> None:
        self.http, self.oracle, self.state, self.generators = http, oracle, state, generators

    def make(self, **order: Any) -> dict[str, Any]:
        made = self.http.post("/v1/adapters/generate", json=order)
        assert made.status_code == 201, made.text
        card: dict[str, Any] = made.json()
        return card

    def probabilities(self, images: list[Any], adapter: object) -> torch.Tensor:
        body = {"input": [data_url(i) for i in images], "labels": LABELS, "adapter": adapter}
        answer = self.http.post("/v1/classify/zero-shot", json=body)
        assert answer.status_code == 200, answer.text
        return torch.tensor([row["probs"] for row in answer.json()["data"]])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clip-experts")
    base = save_drawn_clip(folder / "base", steps=40)
    oracle = Peft(base)
    oracle.model.save_pretrained(folder / "adapters")
    for i, description in enumerate(DESCRIPTIONS):
        card = {"description": description}
        (folder / "adapters" / f"expert{i}" / "card.json").write_text(json.dumps(card))
    (folder / "generators").mkdir()
    flags = ("--adapters-dir", folder / "adapters", "--generator-dir", folder / "generators")
    with (
        server_process(base, folder / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        for i in range(len(DESCRIPTIONS)):  # the server listens before it has read the folder
            http.post(f"/v1/adapters/expert{i}/warm").raise_for_status()
        yield Served(http, oracle, folder / "state", folder / "generators")


@pytest.fixture(scope="module")
def images() -> list[Any]:
    import random

    rng = random.Random(3)
    return [drawing(KNOWN[i], rng) for i in (0, 10, 38)]


def test_clip_itself_weighs_the_experts_and_peft_mixes_them_alike(
    served: Served, images: list[Any]
) -> None:
    sentence = "a photo of a blue ring."
    alpha = served.oracle.weights(sentence)
    card = served.make(description=sentence, method="sg-lora", name="mixture", force=True)
    told = card["provenance"]
    assert told["method"] == "sg-lora mixture"
    assert told["parts"] == pytest.approx(alpha, abs=1e-3)
    assert card["base_agreement"] is None  # an encoder answers no chats
    parts = told["parts"]
    served.oracle.model.add_weighted_adapter([*parts], [*alpha.values()], "theirs", "cat")
    expected = served.oracle.probabilities(images, "theirs")
    assert (served.probabilities(images, "mixture") - expected).abs().max() < 1e-4
    assert (expected - served.oracle.probabilities(images, "expert0")).abs().max() > 1e-2


def test_a_request_may_describe_its_adapter(served: Served, images: list[Any]) -> None:
    described = {"description": DESCRIPTIONS[1], "method": "sg-lora"}
    card = served.make(description=DESCRIPTIONS[1], method="sg-lora")
    assert max(card["provenance"]["parts"], key=card["provenance"]["parts"].get) == "expert1"
    named = served.probabilities(images, card["name"])
    assert torch.equal(served.probabilities(images, described), named)


def test_a_description_longer_than_the_tower_is_cut_as_clip_cuts_texts(served: Served) -> None:
    long = "a photo of a red circle. " * 20
    card = served.make(description=long, method="sg-lora", force=True)
    words = long.split()
    cut = " ".join(words)  # the tokenizer splits the full stop off: six tokens a sentence
    tokenizer = AutoTokenizer.from_pretrained(served.oracle.base)
    ids = tokenizer(cut, truncation=True, max_length=16).input_ids
    assert len(ids) == 16
    expected = served.oracle.weights(tokenizer.decode(ids[1:-1]))
    assert card["provenance"]["parts"] == pytest.approx(expected, abs=1e-3)


def test_what_needs_a_language_model_is_refused(served: Served) -> None:
    order = {"description": "a red circle", "method": "icm-lora"}
    refused = served.http.post("/v1/adapters/generate", json=order)
    assert (refused.status_code, "this base is an encoder" in refused.text) == (400, True)


def test_sg_lora_is_fitted_to_experts_of_a_clip(served: Served, images: list[Any]) -> None:
    order = ["generator", "train", "--from-store", "--state-dir", str(served.state)]
    order += ["--out", str(served.generators), "--steps", "30"]
    unnamed = CliRunner().invoke(app, order)
    assert (unnamed.exit_code, "name it with --base" in unnamed.output) == (1, True)
    result = CliRunner().invoke(app, [*order, "--base", str(served.oracle.base)])
    assert result.exit_code == 0, result.output
    fitted = FittedExperts.load(served.generators / EXPERTS_FILE)
    assert (fitted.by_base, fitted.icm, len(fitted.names)) == (True, None, len(DESCRIPTIONS))
    card = served.make(description=DESCRIPTIONS[2], method="sg-lora", name="fitted", force=True)
    assert card["provenance"]["generator"] == fitted.digest
    parts = card["provenance"]["parts"]
    served.oracle.model.add_weighted_adapter([*parts], [*parts.values()], "decoded", "cat")
    expected = served.oracle.probabilities(images, "decoded")
    # The file holds the experts in four bits a number.
    assert (served.probabilities(images, "fitted") - expected).abs().max() < 0.05
