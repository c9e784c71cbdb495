"""Training on chats in the browser: the file, the losses as they come, and the adapter."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from openai import OpenAI
from playwright.sync_api import Page, expect

from loraplex_training.config import FAMILIES, RECIPES
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
N_EXAMPLES = 24


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("training")
    model = save_tiny_model(folder / "tiny")
    with server_process(model, folder / "state", "--allow-training") as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "says ab.jsonl"
    pairs = [{"prompt": f"word {i}", "answer": "AB"} for i in range(N_EXAMPLES)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def _train(
    page: Page,
    server: ServerProcess,
    data: Path,
    name: str,
    steps: int,
    metric: str = "nothing",
    kind: str = "lora",
) -> None:
    page.goto(f"{server.url}/#/create")
    page.get_by_role("button", name="From chats").click()
    page.get_by_label("A JSONL file of chats").set_input_files(data)
    expect(page.get_by_text(f"{N_EXAMPLES} examples in {data.name}")).to_be_visible()
    expect(page.get_by_label("Name", exact=True)).to_have_value("says-ab")  # of the file
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Kind").select_option(kind)
    page.get_by_label("Steps").fill(str(steps))
    if kind == "prefix":
        expect(page.get_by_label("Rank")).to_be_disabled()  # it has none
    else:
        page.get_by_label("Rank").fill("4")
    page.get_by_label("Learning rate").fill("0.02")
    page.get_by_label("Score its answers by").select_option(metric)
    page.get_by_role("button", name="Train", exact=True).click()


def test_losses_are_drawn_and_the_adapter_answers_beside_the_base(
    page: Page, training: ServerProcess, data: Path
) -> None:
    _train(page, training, data, "ab", 40, "contained")
    region = page.get_by_role("region", name="Training", exact=True)
    expect(region.locator("canvas")).to_be_visible()
    expect(region.get_by_role("heading", name="ab: succeeded")).to_be_visible()
    told = region.get_by_role("status").inner_text()
    found = re.search(
        r"step 40 of 40; .*on held-out examples ([\d.]+), the base has ([\d.]+)", told
    )
    assert found is not None, told
    assert float(found[1]) < float(found[2])
    cells = page.get_by_role("region", name="Before and after").locator("tbody td")
    expect(cells.nth(0)).to_have_text("word 0")
    expect(cells.nth(2)).to_contain_text("AB")
    expect(cells.nth(1)).not_to_contain_text("AB")
    assert Axe().run(page).violations_count == 0
    assert _scores(page) == _told(training, "ab", "contains")
    page.get_by_role("link", name="card", exact=True).click()
    expect(page.get_by_text("Loss on held-out examples: ")).to_be_visible()
    assert _scores(page) == _told(training, "ab", "contains")
    assert Axe().run(page).violations_count == 0


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        pytest.param("mixlora", "family", marks=pytest.mark.nightly),
        ("prefix", "family"),
        ("sora", "recipe"),
    ],
)
def test_another_kind_of_adapter_is_trained(
    page: Page, training: ServerProcess, data: Path, kind: str, field: str
) -> None:
    _train(page, training, data, kind, 2, kind=kind)
    region = page.get_by_role("region", name="Training", exact=True)
    expect(region.get_by_role("heading", name=f"{kind}: succeeded")).to_be_visible()
    card = httpx.get(f"{training.url}/v1/adapters/{kind}", timeout=60).json()
    assert card["provenance"]["training"][field] == kind


def test_every_family_and_recipe_can_be_chosen(page: Page, training: ServerProcess) -> None:
    page.goto(f"{training.url}/#/create")
    page.get_by_role("button", name="From chats").click()
    options = page.get_by_label("Kind").locator("option")
    values = options.evaluate_all("options => options.map(option => option.value)")
    assert sorted(values) == sorted({*FAMILIES, *RECIPES})


def _scores(page: Page) -> list[str]:
    """Return the scores that the page shows: of the base and of the adapter."""
    shown = page.get_by_role("region", name="Scores")
    expect(shown.locator(".number")).to_have_count(2)
    return shown.locator(".number").all_inner_texts()


def _told(server: ServerProcess, adapter: str, metric: str) -> list[str]:
    """Return the scores on the card of an adapter that answers better than the base."""
    card = httpx.get(f"{server.url}/v1/adapters/{adapter}", timeout=60).json()
    evaluation = card["provenance"]["training"]["evaluation"]
    assert evaluation["metric"] == metric
    assert evaluation["score_before"] < evaluation["score_after"]
    return [f"{evaluation[key]:.2f}" for key in ("score_before", "score_after")]


def test_the_card_of_a_fine_tuning_job_shows_its_scores(
    page: Page, training: ServerProcess, data: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    text = "\n".join(map(json.dumps, chats)).encode()
    with OpenAI(base_url=f"{training.url}/v1", api_key="none", timeout=600) as client:
        file = client.files.create(file=("ab.jsonl", text), purpose="fine-tune")
        client.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 20, "learning_rate_multiplier": 10}},
            },
            extra_body={"adapter": "tuned", "metric": "exact"},
        )
    page.goto(f"{training.url}/#/adapters")
    page.get_by_role("button", name="tuned", exact=True).click()  # it comes by itself
    expect(page.get_by_text("Loss on the first training examples: ")).to_be_visible()
    assert _scores(page) == _told(training, "tuned", "exact")


def test_a_training_is_cancelled(page: Page, training: ServerProcess, data: Path) -> None:
    page.goto("about:blank")
    _train(page, training, data, "never", 10_000)
    region = page.get_by_role("region", name="Training", exact=True)
    expect(region.get_by_role("status")).to_contain_text("loss")
    page.get_by_role("button", name="Cancel").click()
    expect(region.get_by_role("heading", name="cancelled")).to_be_visible()


def test_a_training_without_time_for_all_steps_says_so(
    page: Page, tmp_path: Path, data: Path
) -> None:
    flags = ("--allow-training", "--max-learning-time", "5")
    with server_process(save_tiny_model(tmp_path / "tiny"), tmp_path / "state", *flags) as server:
        _train(page, server, data, "late", 10_000)
        region = page.get_by_role("region", name="Training", exact=True)
        expect(region.get_by_role("heading", name="late: succeeded")).to_be_visible()
        expect(region.get_by_text("The time was over after")).to_contain_text("of 10000 steps")
        page.goto("about:blank")


def test_what_the_server_refuses_is_told(page: Page, training: ServerProcess, data: Path) -> None:
    data.write_text('{"prompt": "x", "answer": "y"}\n{"prompt": "x"}\n')
    page.goto("about:blank")
    page.goto(f"{training.url}/#/create")
    page.get_by_role("button", name="From chats").click()
    page.get_by_label("A JSONL file of chats").set_input_files(data)
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("examples[1]")
    data.write_text("no JSON\n")
    page.get_by_label("A JSONL file of chats").set_input_files([])
    page.get_by_label("A JSONL file of chats").set_input_files(data)
    expect(page.get_by_role("alert")).to_contain_text("line 1 is no JSON")
    assert httpx.get(f"{training.url}/version", timeout=60).json()["features"]["train"] is True
