"""Folders that are dropped or chosen: the adapter is found at any depth, nothing else is sent."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Request, expect

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
N_LOGS = 130  # a browser lists a folder a hundred at a time
PARTS = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tiny")
    with server_process(save_tiny_model(folder / "model"), folder / "state") as server:
        yield server


@pytest.fixture
def sent(page: Page) -> list[Request]:
    """Uploads that leave the browser."""
    found: list[Request] = []
    page.on("request", lambda request: found.append(request) if request.method == "PUT" else None)
    return found


def checkpoint(folder: Path, seed: int) -> Path:
    """Write a checkpoint folder as transformers' Trainer leaves it."""
    write_lora(folder, BaseSpec.of(tiny_model(), "tiny"), seed=seed)
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin"):
        (folder / name).write_text("{}")
    return folder


def form_of(page: Page, server: ServerProcess) -> Locator:
    page.goto(f"{server.url}/#/adapters")
    form = page.get_by_role("form", name="Add an adapter")
    expect(form).to_be_visible()
    return form


def drop(page: Page, form: Locator, *paths: Path) -> None:
    """Drop the folders on the page, as from a file manager."""
    box = form.bounding_box()
    assert box is not None
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    place = {"x": box["x"] + 20, "y": box["y"] + 20, "data": data}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place})


def digest(server: ServerProcess, name: str) -> str:
    card = httpx.get(f"{server.url}/v1/adapters/{name}", timeout=60).json()
    return str(card["digest"])


def put(server: ServerProcess, name: str, folder: Path) -> str:
    """The digest of the adapter in ``folder``, uploaded without the console."""
    files = dict(
        zip(("config", "weights"), ((folder / n).read_bytes() for n in PARTS), strict=True)
    )
    httpx.put(f"{server.url}/v1/adapters/{name}", files=files, timeout=60).raise_for_status()
    return digest(server, name)


def test_the_only_adapter_of_a_dropped_folder_is_sent_from_any_depth(
    page: Page, tiny: ServerProcess, tmp_path: Path
) -> None:
    run = tmp_path / "support"
    made = checkpoint(run / "out" / "last" / "checkpoint-100", 1)
    for number in range(N_LOGS):
        (made.parent / f"{number}.log").write_text("")
    form = form_of(page, tiny)
    drop(page, form, run)
    expect(form).to_contain_text("support/out/last/checkpoint-100: adapter_config.json")
    expect(form).to_contain_text("Not used: optimizer.pt, trainer_state.json, training_args.bin")
    expect(form).not_to_contain_text("pickle")
    expect(page.get_by_label("Name", exact=True)).to_have_value("last-checkpoint-100")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("last-checkpoint-100 serves as revision 1")
    assert digest(tiny, "last-checkpoint-100") == put(tiny, "beside", made)


def test_of_several_adapters_one_is_chosen(
    page: Page, tiny: ServerProcess, tmp_path: Path, sent: list[Request]
) -> None:
    """PEFT keeps a second adapter in a folder of the first one's."""
    run = checkpoint(tmp_path / "agent", 2)
    for step in (100, 20):
        checkpoint(run / f"checkpoint-{step}", step)
    write_lora(run / "french", BaseSpec.of(tiny_model(), "tiny"), seed=3)
    form = form_of(page, tiny)
    page.get_by_label("choose its folder").set_input_files(run)
    which = form.get_by_label("4 adapters are in there")
    add = page.get_by_role("button", name="Add", exact=True)
    page.get_by_label("Name", exact=True).fill("mine")
    expect(add).to_be_disabled()
    told = which.locator("option").all_inner_texts()
    assert [text.strip() for text in told] == [
        "which one?",
        "agent",
        "agent/checkpoint-20",
        "agent/checkpoint-100",
        "agent/french",
    ]
    assert Axe().run(page).violations_count == 0
    page.get_by_label("Name", exact=True).fill("")
    for folder, name in (
        ("agent/checkpoint-20", "agent-checkpoint-20"),
        ("agent/french", "french"),
    ):
        which.select_option(folder)
        expect(page.get_by_label("Name", exact=True)).to_have_value(name)
    assert not sent
    add.click()
    expect(page.get_by_role("status")).to_contain_text("french serves as revision 1")
    assert digest(tiny, "french") == put(tiny, "also-french", run / "french")


def test_two_dropped_folders_are_both_looked_at(
    page: Page, tiny: ServerProcess, tmp_path: Path
) -> None:
    folders = [checkpoint(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    form = form_of(page, tiny)
    drop(page, form, *folders)
    which = form.get_by_label("2 adapters are in there")
    which.select_option("two")
    expect(page.get_by_label("Name", exact=True)).to_have_value("two")


@pytest.mark.parametrize("way", ["dropped", "chosen"])
def test_a_folder_without_an_adapter_is_refused_before_anything_is_sent(
    page: Page, tiny: ServerProcess, tmp_path: Path, sent: list[Request], way: str
) -> None:
    folder = tmp_path / "photos"
    (folder / "2024").mkdir(parents=True)
    for number in range(3):
        (folder / "2024" / f"{number}.jpg").write_text("")
    form = form_of(page, tiny)
    if way == "dropped":
        drop(page, form, folder)
    else:
        page.get_by_label("choose its folder").set_input_files(folder)
    told = form.get_by_role("alert")
    expect(told).to_contain_text("No adapter_config.json among the 3 files")
    expect(told).to_contain_text("save_pretrained")
    expect(page.get_by_role("button", name="Add", exact=True)).to_be_disabled()
    assert not sent


def test_a_checkpoint_whose_weights_are_a_pickle_says_how_to_convert_it(
    page: Page, tiny: ServerProcess, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "old", 4)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    form = form_of(page, tiny)
    drop(page, form, folder)
    expect(form).to_contain_text("still needed: adapter_model.safetensors")
    expect(form).to_contain_text("A pickle is refused; loraplex adapters convert")


def test_the_pooling_of_sentence_transformers_goes_along(
    page: Page, tiny: ServerProcess, tmp_path: Path
) -> None:
    """The server reads it from its folder: a mode that nobody knows is refused by that name."""
    folder = checkpoint(tmp_path / "vectors", 5)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode": "loudest"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    form = form_of(page, tiny)
    page.get_by_label("choose its folder").set_input_files(folder)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(form.get_by_role("alert")).to_contain_text("1_Pooling/config.json: pooling_mode")
