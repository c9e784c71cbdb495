"""Each page's main action, in a real browser against a real server with the default base."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from openai import OpenAI
from playwright.sync_api import ConsoleMessage, Page, expect

from tests.console.conftest import DEMOS
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
PROMPT = "You are a pirate. What is the capital of Spain?"


@pytest.fixture(autouse=True)
def no_violations(page: Page) -> Iterator[None]:
    """No script fails, and nothing that the content policy forbids is tried."""
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            problems.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield
    assert not problems


def answer_of(server: ServerProcess, adapter: str | None) -> str:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        answer = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0,
            max_tokens=24,
            extra_body={"adapter": adapter} if adapter else {},
        )
    return answer.choices[0].message.content or ""


def lanes(page: Page) -> list[str]:
    return page.locator("section[aria-label^=Answer] .answer").all_inner_texts()


def ask_all(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).not_to_have_value("")  # the adapters are listed, and one has an example
    prompt.fill(PROMPT)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Max tokens").fill("24")
    page.get_by_role("button", name="Ask all").click()
    expect(page.get_by_role("button", name="Ask all")).to_be_visible(timeout=120_000)


def test_the_playground_shows_what_the_api_answers_side_by_side(
    page: Page, server: ServerProcess
) -> None:
    page.goto(f"{server.url}/#/playground?adapter=pirate")
    expect(page.get_by_label("Adapter", exact=True)).to_have_value("pirate")
    ask_all(page)
    assert [text.strip() for text in lanes(page)] == [
        answer_of(server, None).strip(),
        answer_of(server, "pirate").strip(),
    ]
    for told in page.locator("section[aria-label^=Answer] > p.muted").all_inner_texts():
        assert re.search(r"first token [\d.]+ m?s · [\d.]+ tokens/s · \d+ tokens", told), told


def test_the_request_that_is_shown_gives_the_same_answer(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/#/playground?adapter=pirate")
    ask_all(page)
    page.get_by_label("Show the request").select_option("python")
    code = page.get_by_test_id("request").inner_text()
    printed: list[str] = []
    exec(code, {"print": printed.append})
    assert printed[0].strip() == lanes(page)[1].strip()


def test_a_chat_goes_on_and_its_link_asks_the_same(page: Page, server: ServerProcess) -> None:
    """The second question goes behind the first one and its own answer, in each column."""
    page.goto(f"{server.url}/#/playground?adapter=pirate")
    ask_all(page)
    first = lanes(page)
    page.get_by_label("go on from the answers").check()
    page.get_by_label("Prompt", exact=True).fill("And of France?")
    page.get_by_role("button", name="Ask all").click()
    expect(page.get_by_role("button", name="Ask all")).to_be_visible(timeout=120_000)
    turns = page.locator("section[aria-label^=Answer] .turn.assistant").all_inner_texts()
    assert [turn.strip() for turn in turns] == [one.strip() for one in first]
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        for adapter, before, shown in zip((None, "pirate"), first, lanes(page), strict=True):
            answer = client.chat.completions.create(
                model="base",
                messages=[
                    {"role": "user", "content": PROMPT},
                    {"role": "assistant", "content": before},
                    {"role": "user", "content": "And of France?"},
                ],
                temperature=0,
                max_tokens=24,
                extra_body={"adapter": adapter} if adapter else {},
            )
            assert (answer.choices[0].message.content or "").strip() == shown.strip()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.goto(link)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("And of France?")
    expect(page.get_by_label("Adapter", exact=True)).to_have_value("pirate")
    expect(page.locator("section[aria-label^=Answer]")).to_have_count(2)


def test_a_file_of_questions_is_scored_side_by_side(page: Page, server: ServerProcess) -> None:
    expected = (answer_of(server, "pirate"), "something else")
    lines = [json.dumps({"prompt": PROMPT, "answer": answer}) for answer in expected]
    page.goto(f"{server.url}/#/playground?adapter=pirate")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Max tokens").fill("24")
    page.get_by_text("Evaluate a file of questions").click()
    chooser = page.get_by_label("JSONL file")
    bad = {"name": "bad.jsonl", "mimeType": "text/plain", "buffer": b'{"prompt": "x"}'}
    chooser.set_input_files(bad)  # type: ignore[arg-type]
    expect(page.get_by_text("line 1: ")).to_be_visible()
    file = {"name": "q.jsonl", "mimeType": "text/plain", "buffer": "\n".join(lines).encode()}
    chooser.set_input_files(file)  # type: ignore[arg-type]
    page.get_by_role("button", name="Evaluate 2").click()
    expect(page.get_by_role("button", name="Evaluate 2")).to_be_visible(timeout=120_000)
    scores = page.get_by_test_id("scores").locator("tbody tr").first.locator("td")
    assert scores.all_inner_texts()[2:] == ["0 of 2 (0 %)", "1 of 2 (50 %)"]


def test_auto_is_explained(page: Page, server: ServerProcess) -> None:
    page.goto(server.url)
    page.get_by_role("button", name="+ auto").click()
    ask_all(page)
    told = page.get_by_test_id("routing")
    expect(told).to_contain_text("auto chose pirate")
    expect(told).to_contain_text("margin")
    expect(told.get_by_role("meter")).to_have_count(2)


def test_an_adapter_is_uploaded_pinned_shown_and_deleted(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/#/adapters")
    folder = DEMOS / "german-numbers"
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    pickle = {"name": "adapter_model.bin", "mimeType": "text/plain", "buffer": b"x"}
    page.get_by_label("choose its files").set_input_files(pickle)  # type: ignore[arg-type]
    expect(page.get_by_text("Not used: adapter_model.bin. A pickle is refused")).to_be_visible()
    page.get_by_label("choose its files").set_input_files(files[:1])
    expect(page.get_by_text("still needed: adapter_model.safetensors")).to_be_visible()
    page.get_by_label("choose its files").set_input_files(files)
    page.get_by_label("Name", exact=True).fill("numbers")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("numbers serves as revision 1")
    row = page.locator("tr", has=page.get_by_role("button", name="numbers", exact=True))
    row.get_by_role("button", name="Actions for numbers").click()
    row.get_by_role("button", name="Pin").click()
    expect(row.get_by_label("pinned")).to_be_visible()
    row.get_by_role("button", name="Warm").click()
    expect(row.get_by_text("device")).to_be_visible()
    expect(row.get_by_role("button", name="Unload")).to_be_disabled()  # it is pinned
    page.keyboard.press("Escape")
    expect(row.get_by_role("button", name="Unload")).to_have_count(0)
    row.get_by_role("button", name="numbers", exact=True).click()
    expect(page.get_by_role("img", name="How much each layer is changed")).to_be_visible()
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Yes, delete it").click()
    expect(row).to_have_count(0)


def test_a_folder_that_is_refused_is_named_until_it_goes(
    page: Page, server: ServerProcess, demos: Path
) -> None:
    folder = demos / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    page.goto(f"{server.url}/#/adapters")
    note = page.get_by_text("The folder broken is refused: ")
    expect(note).to_be_visible()
    shutil.rmtree(folder)
    expect(note).to_have_count(0)


def test_an_adapter_is_unloaded_and_answers_again(page: Page, server: ServerProcess) -> None:
    before = answer_of(server, "pirate")
    page.goto(f"{server.url}/#/adapters")
    row = page.locator("tr", has=page.get_by_role("button", name="pirate", exact=True))
    cells = row.locator("td")
    expect(cells.nth(3)).to_have_text("device")
    for column in (5, 6):
        expect(cells.nth(column)).to_have_text(re.compile(r"[\d.]+ [KM]iB"))
    row.get_by_role("button", name="Actions for pirate").click()
    row.get_by_role("button", name="Unload").click()
    expect(cells.nth(3)).to_have_text("disk")
    for column in (5, 6):
        expect(cells.nth(column)).to_have_text("–")
    expect(row.get_by_role("button", name="Unload")).to_be_disabled()
    assert answer_of(server, "pirate") == before
    expect(cells.nth(3)).to_have_text("device")


def test_the_table_tells_what_an_adapter_has_done_and_sorts_by_it(
    page: Page, server: ServerProcess
) -> None:
    for _ in range(2):
        answer_of(server, "emoji")
    told = httpx.get(f"{server.url}/v1/adapters/emoji", timeout=60).json()
    page.goto(f"{server.url}/#/adapters")
    row = page.locator("tr", has=page.get_by_role("button", name="emoji", exact=True))
    cells = row.locator("td")
    expect(cells.nth(3)).to_have_text("device")
    expect(cells.nth(7)).to_have_text(str(told["usage"]["requests"]))
    expect(cells.nth(9)).to_have_text(re.compile(r"[\d.]+ m?s"))
    expect(cells.nth(9)).to_have_attribute("title", re.compile("to the device [^n]"))
    used = page.get_by_role("columnheader", name="Requests")
    used.get_by_role("button").click()
    expect(used).to_have_attribute("aria-sort", "descending")
    cards = httpx.get(f"{server.url}/v1/adapters", timeout=60).json()["data"]
    most = max(card["usage"]["requests"] for card in cards)
    first = page.get_by_role("region", name="Adapters").locator("tbody tr").first
    expect(first.locator("td").nth(7)).to_have_text(str(most))


def share(counts: list[int], expert: int) -> str:
    """Round as JavaScript does."""
    return f"{int(100 * counts[expert] / sum(counts) + 0.5)} %"


def test_the_card_of_routed_experts_shows_their_load(page: Page, server: ServerProcess) -> None:
    folder, url = DEMOS / "chores", f"{server.url}/v1/adapters/chores"
    parts = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    files = {part: (folder / name).read_bytes() for part, name in parts.items()}
    assert httpx.put(url, files=files, timeout=60).status_code == 201
    try:
        page.goto(f"{server.url}/#/adapters?name=chores")
        load = page.get_by_role("region", name="Load of the experts", exact=True)
        expect(load).to_contain_text("No request used it in the last minute")
        answer_of(server, "chores")
        picture = load.get_by_role("img", name="Load of the experts")  # comes by itself
        expect(picture).to_have_attribute("aria-label", re.compile("30 .*, 6 experts. Least even"))
        told = httpx.get(f"{url}/routing", timeout=60).json()["places"]
        assert picture.locator("rect title").all_text_contents() == [
            f"{place['place']}, expert {expert}: {share(place['counts'], expert)} ({count} tokens)"
            for place in told
            for expert, count in enumerate(place["counts"])
        ]
        marks = [place["imbalance"] >= 2 for place in told]
        remarks = picture.locator("text", has_text="×").all_text_contents()
        assert ["▲" in remark for remark in remarks] == marks
        load.get_by_text("The same as numbers").click()
        line = load.get_by_role("row", name=told[0]["place"])
        expect(line).to_contain_text(share(told[0]["counts"], 0))
        for scheme in ("light", "dark"):
            # No transitions: axe would look at colours on their way.
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
    finally:
        httpx.delete(url, timeout=60)


def test_a_refused_upload_says_why(page: Page, server: ServerProcess, tmp_path: Path) -> None:
    broken = tmp_path / "adapter_model.safetensors"
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    page.goto(f"{server.url}/#/adapters")
    config = DEMOS / "emoji" / "adapter_config.json"
    page.get_by_label("choose its files").set_input_files([config, broken])
    page.get_by_label("Name", exact=True).fill("broken")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("adapter_model.safetensors")


def test_a_sentence_becomes_an_adapter_that_answers_differently(
    page: Page, server: ServerProcess
) -> None:
    page.goto(f"{server.url}/#/create")
    page.get_by_label("What shall it do?").fill("Write the date in German as JSON")
    page.get_by_label("Prompts to compare").fill("2020-12-18")
    page.get_by_role("button", name="Create", exact=True).click()
    table = page.get_by_role("region", name="Before and after")
    expect(table).to_be_visible(timeout=120_000)
    cells = table.locator("tbody td")
    expect(cells.nth(2)).not_to_have_text("…", timeout=120_000)
    assert cells.nth(1).inner_text() != cells.nth(2).inner_text()
    unnamed = page.get_by_role("heading", name="answers now").inner_text().split()[0]
    page.get_by_label("Save under a name").fill("german-dates")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("heading", name="german-dates answers now")).to_be_visible()
    digests = {
        httpx.get(f"{server.url}/v1/adapters/{name}", timeout=60).json()["digest"]
        for name in (unnamed, "german-dates")
    }
    assert len(digests) == 1
    page.goto(f"{server.url}/#/adapters")
    expect(page.get_by_role("button", name="german-dates", exact=True)).to_be_visible()


def test_an_adapter_is_mixed_from_the_servers_own(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/#/create")
    page.get_by_label("What shall it do?").fill("Talk like a pirate")
    page.get_by_label("Made by").select_option("sg-lora")
    page.get_by_role("button", name="Create", exact=True).click()
    made_of = page.get_by_role("region", name="What it is made of")
    expect(made_of).to_contain_text("by sg-lora mixture", timeout=120_000)
    expect(made_of).to_contain_text("pirate")
    page.get_by_label("Made by").select_option("icm-lora")
    page.get_by_role("textbox", name="Inputs of the task").fill(
        "\n".join(f"input {i}" for i in range(8))
    )
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("loraplex generator train")


def test_what_the_generator_refuses_is_told(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/#/create")
    page.get_by_label("What shall it do?").fill("Prove the Riemann hypothesis in Latin hexameters.")
    page.get_by_label("Made by").select_option("sg-lora")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("description", timeout=120_000)
    strange = page.get_by_role("region", name="How strange")
    expect(strange).to_contain_text("unlike the description of every adapter")
    page.get_by_role("button", name="Make it anyway").click()
    expect(page.get_by_role("heading", name="answers now")).to_be_visible(timeout=120_000)


def test_live_shows_the_running_batch_and_requests_its_end(
    page: Page, server: ServerProcess
) -> None:
    page.goto(f"{server.url}/#/live")
    expect(page.get_by_text("Nothing runs.")).to_be_visible()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        stream = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=2000,
            stream=True,
            extra_body={"adapter": "pirate", "ignore_eos": True},
        )
        with stream:
            next(iter(stream))
            batch = page.get_by_role("region", name="The batch")
            expect(batch.locator(".call")).to_contain_text("pirate")
            expect(page.get_by_role("region", name="Adapters on the device")).to_contain_text(
                "pirate"
            )
            expect(page.get_by_test_id("output-rate")).not_to_have_text("0.0")
    expect(page.get_by_text("Nothing runs.")).to_be_visible()
    page.goto(f"{server.url}/#/requests")
    row = page.get_by_role("region", name="Calls").locator("tbody tr").first
    expect(row.locator("td").nth(1)).to_have_attribute("title", re.compile("pirate@[0-9a-f]+"))
    expect(row).to_contain_text("client_left")
