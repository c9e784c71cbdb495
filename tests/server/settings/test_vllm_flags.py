"""Command lines of vLLM start this server, and the page for newcomers says what the code does."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex_server.api.compat.other_routes import OTHER_ROUTES
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.protocol.generation import ResponseFormat
from loraplex_server.api.serving.unsupported import OF_TEXT, refuse_unsupported
from loraplex_server.cli.app import app
from loraplex_server.errors import ApiError
from loraplex_server.metrics.families import HELP
from loraplex_server.settings.config import ConfigError, LoraModule
from loraplex_server.settings.sources import resolve_config, server_options
from loraplex_server.settings.vllm_flags import REFUSED, RENAMED, WITHOUT_EFFECT, our_flags
from tests.server.conftest import Front, routes_of

PAGE = Path(__file__).parents[3] / "docs" / "coming-from.md"
OPTIONS = {option.dashed for option in server_options()}


def _table(head: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the code words of the first and of the second cell of each row of a table."""
    _, _, rest = PAGE.read_text().partition(f"| {head} |\n")
    for line in rest.splitlines()[1:]:
        if not line.startswith("|"):
            return
        first, second = line.strip("|").split(" | ")
        yield re.findall(r"`([^`]+)`", first), re.findall(r"`([^`]+)`", second)


def test_vllms_own_example_becomes_our_options() -> None:
    line = """--model meta/llama --enable-lora --lora-modules a=/x b=/y=z '{"name": "c", "path":
    "/w", "base_model_name": "meta/llama"}' --max-loras=4 --max_lora_rank 64 --max-cpu-loras 9
    --max-num-seqs 32 --max-num-batched-tokens 512 --served-model-name one two --dtype half
    --gpu-memory-utilization 0.8 -tp 2 -q awq --enable-auto-tool-choice --tool-call-parser hermes
    --enforce-eager --allowed-origins '["https://a.example"]' --load-format auto"""
    ours, notes = our_flags(shlex.split(line))
    context = _serve_context(ours)
    config = resolve_config(context)
    assert config.model == "meta/llama"
    assert config.store.lora_modules == (
        LoraModule("a", Path("/x")),
        LoraModule("b", Path("/y=z")),
        LoraModule("c", Path("/w")),
    )
    engine = config.engine
    assert (engine.max_loras, engine.max_lora_rank, engine.max_batch_size) == (4, 64, 32)
    assert (engine.max_step_tokens, engine.dtype, engine.quantization) == (512, "float16", "none")
    assert (engine.gpu_memory_utilization, engine.tensor_parallel_size) == (0.8, 2)
    assert engine.cuda_graphs is False
    assert config.http.served_model_names == ("one", "two")
    assert config.http.cors_origins == ("https://a.example",)
    flags = [note.split()[0] for note in notes]
    assert flags == [
        *("--enable-lora", "--max-cpu-loras", "--quantization"),
        *("--enable-auto-tool-choice", "--tool-call-parser"),
    ]


def _serve_context(words: list[str]) -> dict[str, object]:
    from typer.main import get_command

    from loraplex_server.cli.serve import given_flags

    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", words)
    return given_flags({k: v for k, v in context.params.items() if k not in ("base", "config")})


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_cannot_be_followed_is_refused_with_a_remedy(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} is no option of this server: ..."):
        our_flags([f"--{flag}", "value"])
    for harmless in REFUSED[flag].harmless:
        assert our_flags([f"--{flag}={harmless}"]) == ([], [])


def test_vllms_guesses_from_the_text_are_our_drafts() -> None:
    ngram = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert our_flags(["--speculative-config", ngram, "m"]) == (
        ["m"],
        [f"--speculative-config {ngram} has no effect: --drafts auto, the default, does it"],
    )
    for other in ('{"method": "eagle"}', '"ngram"', "ngram"):
        with pytest.raises(ConfigError, match="--drafts auto"):
            our_flags([f"--speculative-config={other}"])


def test_the_model_may_stand_alone_and_errors_name_what_is_near(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    result = CliRunner().invoke(app, ["serve", "--enable-lora", missing, "--port=0"])
    assert "is not on this machine" in result.output
    result = CliRunner().invoke(app, ["serve", missing, "--model=other", "--port=0"])
    assert "given twice" in " ".join(result.output.split())
    for written, near in (("max_num_seqs", "max-batch-size"), ("adapter-dir", "adapters-dir")):
        file = tmp_path / "options.yaml"
        file.write_text(f"{written}: 1\n")
        with pytest.raises(ConfigError, match=near):
            resolve_config({}, file)


def test_modules_of_vllms_json_need_a_name_and_a_path() -> None:
    for module in ('{"name": "a"}', '{"name": "a", "path": "/x", "scale": 2}', "{"):
        with pytest.raises(ConfigError, match="lora-modules"):
            resolve_config({"lora_modules": [module]})


def test_the_page_renames_what_the_code_renames() -> None:
    written = {
        flag.removeprefix("--"): ours[0].removeprefix("--")
        for flags, ours in _table("flag | the option here")
        for flag in flags
    }
    assert written == dict(RENAMED)
    assert {name.removeprefix("no-") for name in written.values()} <= OPTIONS


@pytest.mark.parametrize(
    ("head", "flags"),
    [
        ("flag | because", {flag.removesuffix(" N") for flag in WITHOUT_EFFECT} | {"quantization"}),
        ("flag | instead", set(REFUSED)),
    ],
)
def test_the_page_lists_what_the_code_leaves_out_and_refuses(head: str, flags: set[str]) -> None:
    written = [word for words, _ in _table(head) for word in words if word.startswith("--")]
    assert sorted(word.removeprefix("--") for word in written) == sorted(flags)
    ours = [word for _, words in _table(head) for word in words if word.startswith("--")]
    assert {word.split()[0].removeprefix("--") for word in ours} <= OPTIONS


def test_the_page_names_real_fields() -> None:
    rows = list(_table("field | the field here"))
    assert rows
    read = {
        str(field.alias or name)
        for body in (ChatBody, ResponseFormat)
        for name, field in body.model_fields.items()
    }
    for fields, ours in rows:
        assert {*ours} <= read
        assert {*fields} <= read | OF_TEXT.keys()
    refused = PAGE.read_text().partition("These are refused by name")[2].partition("\n")[0]
    for name in re.findall(r"`([^`]+)`", refused):
        with pytest.raises(ApiError, match=name):
            refuse_unsupported({name: "x"}, OF_TEXT)


def test_the_page_names_real_metrics() -> None:
    rows = list(_table("metric | the metric here"))
    assert rows
    assert {name for _, names in rows for name in names} <= HELP.keys()
    assert not {name for names, _ in rows for name in names} & HELP.keys()


def test_the_page_names_real_routes(fuzz_front: Front) -> None:
    served = {path for _, path in routes_of(fuzz_front.app)}
    rows = list(_table("route | the route here"))
    assert rows
    assert {path: ours[0] for paths, ours in rows for path in paths} == OTHER_ROUTES
    assert {*OTHER_ROUTES.values()} <= served
    assert not OTHER_ROUTES.keys() & served


@pytest.mark.anyio
async def test_a_route_of_another_server_names_the_route_here(fuzz_front: Front) -> None:
    for path, ours in OTHER_ROUTES.items():
        answer = await fuzz_front.client.post(path, json={})
        assert answer.status_code in (404, 405)
        assert f"this server has {ours}" in answer.json()["error"]["message"]
