"""Answers and calls as the pages show them, of a real front over a scripted engine."""

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import torch
from playwright.sync_api import Page, expect
from safetensors.torch import load_file, save_file

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.served_app import served_app

pytestmark = pytest.mark.slow
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
SAME = {"x-request-id": "the-same", "content-type": "application/json"}


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "tiny/llama")


@pytest.fixture
def front(spec: BaseSpec, tmp_path: Path) -> Iterator[Front]:
    """It has ``thinker``, an adapter that reasons, and ``mood``, a classifier."""
    front = make_front(tiny_tokenizer(), spec, tmp_path)
    markers = {"reasoning": {"open": "[plan]", "close": "[/plan]"}}
    options = PutOptions(examples=("hi", "hi"), defaults=markers | {"stop": ["STOP"]})
    front.store.put_directory("thinker", write_lora(front.root / "thinker", spec), options=options)
    front.store.put_directory("mood", classifier(front.root / "mood", spec))
    yield front
    front.store.close()


def classifier(folder: Path, spec: BaseSpec) -> Path:
    write_lora(folder, spec)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    head = {"base_model.model.score.weight": torch.randn(2, 64)}
    save_file(load_file(weights) | head, weights)
    told = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    return folder


@pytest.fixture
def url(front: Front, page: Page) -> Iterator[str]:
    """No script of the page fails."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    with served_app(front.app) as url:
        yield url
        page.goto("about:blank")  # Live would hold its stream open
    assert not problems


def test_calls_that_share_an_id_are_all_shown(page: Page, front: Front, url: str) -> None:
    """Whoever asks chooses ``x-request-id``, and may choose the same one twice."""
    front.engine.manual = True  # they run until they are left
    with ExitStack() as left:
        for _ in range(2):
            one = http.client.HTTPConnection(url.removeprefix("http://"))
            left.enter_context(closing(one)).request(
                "POST", "/v1/chat/completions", json.dumps(CHAT), SAME
            )
        page.goto(f"{url}/#/live")
        calls = page.get_by_role("region", name="The batch").locator(".call")
        expect(calls).to_have_count(2)
        page.goto(f"{url}/#/requests")
        rows = page.get_by_role("region", name="Calls").locator("tbody tr")
        expect(rows).to_have_count(2)
    front.engine.manual = False
    for _ in range(2):
        httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=SAME, timeout=60)
    expect(rows).to_have_count(4)
    expect(rows.filter(has_text="the-same")).to_have_count(4)


def ask(page: Page, url: str, adapter: str, *, with_logprobs: bool = False) -> None:
    page.goto(f"{url}/#/playground?adapter={adapter}")
    if with_logprobs:
        page.locator("summary", has_text="Settings").click()
        page.get_by_label("token probabilities").check()
    expect(page.locator("section[aria-label^=Answer]")).to_have_count(2)
    page.get_by_label("Prompt", exact=True).fill("hi")
    page.get_by_role("button", name="Ask all").click()
    expect(page.get_by_role("button", name="Ask all")).to_be_visible()


def test_reasoning_is_shown_before_the_answer(page: Page, front: Front, url: str) -> None:
    front.engine.answer = "[plan]first this[/plan]The answer."
    ask(page, url, "thinker")
    lane = page.get_by_label("Answer 2")
    expect(lane.locator(".answer")).to_have_text(re.compile(r"^\s*first this\s*The answer\.\s*$"))
    expect(lane.locator(".answer .muted")).to_have_text("first this")
    expect(lane.locator(".facts")).to_contain_text(re.compile(r"first token .* tokens/s"))


@pytest.mark.parametrize(("answer", "shown"), [("[plan]so", "so(empty)"), ("", "(empty)")])
def test_an_answer_without_text_is_not_one_that_was_never_asked(
    page: Page, front: Front, url: str, answer: str, shown: str
) -> None:
    front.engine.answer = answer
    page.goto(f"{url}/#/playground?adapter=thinker")
    lane = page.get_by_label("Answer 2")
    expect(lane.locator(".answer")).to_contain_text("Nothing asked yet.")
    ask(page, url, "thinker")
    expect(lane.locator(".answer")).to_have_text(shown)
    # There is no rate of what never came.
    rated = [expect(lane.locator(".facts")).not_to_contain_text, expect(lane).to_contain_text]
    rated[bool(answer)]("tokens/s")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("Hello, wörld 🌍!", "Hello, wörld 🌍!"),
        ("Hi. STOP more", "Hi. "),
        ("", "(empty)"),
        ("[plan]first this[/plan]plan", "first thisplan"),
        ("[plan]so", "so(empty)"),
    ],
)
def test_with_log_probabilities_the_answer_is_the_same_text(
    page: Page, front: Front, url: str, answer: str, shown: str
) -> None:
    """No end token, no markers, and no character that is cut in two."""
    front.engine.answer = answer
    ask(page, url, "thinker", with_logprobs=True)
    place = page.get_by_label("Answer 2").locator(".answer")
    expect(place).to_have_text(shown)
    marked = place.locator(".token")
    made = "" if shown.endswith("(empty)") else shown.removeprefix("first this")
    assert "".join(marked.all_text_contents()) == made
    for title in [token.get_attribute("title") for token in marked.all()]:
        assert title
        assert title.count(" %") == 3


def test_only_what_chats_is_tried_in_the_playground(page: Page, url: str) -> None:
    page.goto(f"{url}/#/adapters")
    for adapter, shown in (("thinker", 1), ("mood", 0)):
        page.get_by_role("button", name=f"Actions for {adapter}").click()
        menu = page.get_by_role("group", name=f"Actions for {adapter}")
        expect(menu.get_by_role("button", name="Warm")).to_be_in_viewport(ratio=1)
        expect(menu.get_by_role("link", name="Try in the playground")).to_have_count(shown)
    expect(page.get_by_role("group", name="Actions for thinker")).to_have_count(0)  # one at a time
    page.keyboard.press("Escape")
    page.get_by_role("button", name="thinker", exact=True).click()
    expect(page.locator(".card q")).to_have_text(["hi", "hi"])  # a card may say a thing twice


def test_a_narrow_window_says_that_columns_are_hidden(page: Page, url: str) -> None:
    hint = page.get_by_text("More columns: scroll to the right")
    table = page.get_by_role("region", name="Adapters")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{url}/#/adapters")
    expect(hint).to_be_visible()
    table.evaluate("table => table.scrollTo(table.scrollWidth, 0)")
    expect(hint).to_have_count(0)
    expect(table.get_by_role("button", name="thinker", exact=True)).to_be_in_viewport()
    page.set_viewport_size({"width": 1280, "height": 800})
    table.evaluate("table => table.scrollTo(0, 0)")
    expect(hint).to_have_count(0)


def test_an_example_of_the_card_becomes_the_prompt(page: Page, front: Front, url: str) -> None:
    page.goto(f"{url}/#/playground?adapter=thinker")
    page.get_by_label("Prompt", exact=True).fill("")
    examples = page.get_by_role("list", name="Examples")
    examples.get_by_role("button", name="hi").first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hi")
    page.get_by_role("button", name="Ask all").click()
    expect(page.get_by_label("Answer 2").locator(".answer")).to_have_text(front.engine.answer)
    expect(examples).to_have_count(0)


@pytest.mark.parametrize(
    ("asked", "told"),
    [("gone", "There is no adapter “gone”"), ("mood", "“mood” is a classifier")],
)
def test_no_other_adapter_stands_in_for_the_one_of_the_link(
    page: Page, url: str, asked: str, told: str
) -> None:
    page.goto(f"{url}/#/playground?adapter={asked}")
    expect(page.get_by_role("status")).to_contain_text(told)
    expect(page.locator("section[aria-label^=Answer]")).to_have_count(1)
