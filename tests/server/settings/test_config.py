"""The configuration: four sources, one order, and clear refusals."""

from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from docs.site.settings_page import settings_page
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_server.cli.app import app
from loraplex_server.cli.serve import given_flags
from loraplex_server.options import Option
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import ConfigError, is_loopback
from loraplex_server.settings.sources import resolve_config, server_options


def _file(folder: Path, text: str) -> Path:
    path = folder / "loraplex.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "port: 1\nhost: 127.0.0.2\nmax-batch-size: 4\nmax_queue: 7\n"
    for name, value in (("LORAPLEX_PORT", "2"), ("LORAPLEX_MAX_BATCH_SIZE", "5"), ("PORT", "9")):
        monkeypatch.setenv(name, value)
    config = resolve_config({"port": 3}, _file(tmp_path, text))
    assert config.http.port == 3
    assert config.engine.max_batch_size == 5
    assert config.engine.max_queue == 7
    assert config.http.host == "127.0.0.2"


def test_nothing_given_means_the_defaults() -> None:
    config = resolve_config({})
    assert config.http.port == 8000
    assert config.http.host == "127.0.0.1"
    assert config.model is None
    assert config.engine.max_step_tokens is None
    assert config.store.catalogue_limits == CatalogueLimits()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1024", 1024),
        ("2KiB", 2048),
        ("1.5 GiB", 3 << 29),
        ("3MB", 3_000_000),
        ("4g", 4 * 10**9),
        ("7MiB", 7 << 20),
    ],
)
def test_sizes_have_units(text: str, n_bytes: int) -> None:
    assert resolve_config({"kv_memory": text}).engine.kv_memory_bytes == n_bytes


def test_adapters_are_given_as_directories_and_as_named_modules() -> None:
    config = resolve_config(
        {"lora_modules": ["sql=/a/b", "x=c=d"], "adapters_dir": ["/one", "/two"]}
    )
    assert config.store.adapters_dirs == (Path("/one"), Path("/two"))
    assert [(m.name, str(m.path)) for m in config.store.lora_modules] == [
        ("sql", "/a/b"),
        ("x", "c=d"),
    ]


def test_allowed_sources_come_as_a_list_or_with_commas() -> None:
    assert resolve_config({}).store.allow_sources == ()
    for given in ("hf://org/,s3://b/a", ["hf://org", "s3://b/a/"]):
        config = resolve_config({"allow_source": given})
        assert [prefix.text for prefix in config.store.allow_sources] == ["hf://org", "s3://b/a"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"allow_source": ["/srv"]}, "allow-source"),
        ({"port": 70000}, "port"),
        ({"port": "many"}, "port"),
        ({"kv_memory": "lots"}, "kv-memory"),
        ({"max_batch_size": 0}, "max-batch-size"),
        ({"dtype": "int3"}, "dtype"),
        ({"drain_timeout": -1}, "drain-timeout"),
        ({"lora_modules": ["nopath"]}, "lora-modules"),
        ({"log_format": "xml"}, "log-format"),
        ({"prefix_cache": "perhaps"}, "prefix-cache"),
        ({"cuda_graphs": "perhaps"}, "cuda-graphs"),
        ({"api_key": ["short"]}, "api-key"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_value_stops_the_start_and_is_named(flags: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve_config(flags)


@pytest.mark.parametrize("text", ["- a\n", "port: [", "prot: 1\n", "port:\n  a: 1\n"])
def test_a_bad_file_stops_the_start(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        resolve_config({}, _file(tmp_path, text))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_host_without_a_key_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        resolve_config({"host": host})
    assert resolve_config({"host": host, "insecure": True}).http.writes_open is False
    monkeypatch.setenv("LORAPLEX_API_KEY", "long-enough")
    assert resolve_config({"host": host}).http.api_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert resolve_config({"host": host}).http.writes_open


def test_keys_have_scopes_and_are_kept_as_hashes_only() -> None:
    config = resolve_config(
        {
            "api_key": ["all-of-it"],
            "infer_api_key": ["only-infer"],
            "metrics_key": ["only-metrics"],
        }
    )
    full, infer, metrics = config.http.api_keys
    assert full.scopes == {Scope.METRICS, Scope.INFER, Scope.ADMIN}
    assert infer.scopes == {Scope.INFER}
    assert metrics.scopes == {Scope.METRICS}
    assert "all-of-it" not in repr(config)
    assert full.sha256.hex() not in repr(config)
    assert full.id != infer.id


def test_keys_of_the_environment_are_a_list_with_commas_and_blanks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "the-first-key, the-second-key")
    wanted = [ApiKey.of(secret, Scope.ADMIN) for secret in ("the-first-key", "the-second-key")]
    assert list(resolve_config({}).http.api_keys) == wanted
    monkeypatch.setenv("LORAPLEX_API_KEY", " , ")  # no key is not the same as no setting
    with pytest.raises(ConfigError, match="8 characters"):
        resolve_config({})


def test_the_secret_of_a_bad_key_is_not_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config({"api_key": ["s3cret"]})
    assert "s3cret" not in str(caught.value)


def test_the_page_of_settings_is_made_from_the_options() -> None:
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), (
        "python -m docs.site.settings_page > docs/settings.md"
    )


def test_the_help_of_serve_names_every_option() -> None:
    output = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).output
    for option in server_options():
        word = f"--no-{option.dashed}" if option.info.default is True else f"--{option.dashed}"
        assert word in output


@pytest.mark.parametrize("flag", [each for each in server_options() if each.is_flag])
@pytest.mark.parametrize("value", [True, False])
def test_the_command_line_turns_every_flag_on_and_off(
    flag: Option, value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = f"--{flag.dashed}" if value else f"--no-{flag.dashed}"
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = given_flags(serve.make_context("serve", [word]).params)
    assert given == {flag.name: value}
    monkeypatch.setenv(f"LORAPLEX_{flag.name.upper()}", str(not value))
    config = resolve_config(given, _file(tmp_path, f"{flag.dashed}: {not value}"))
    owners = (config, config.http, config.engine, config.store, config.learning)
    assert [getattr(o, flag.field) for o in owners if isinstance(o, flag.owner)] == [value]


def test_no_insecure_refuses_what_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_INSECURE", "true")
    told = CliRunner().invoke(app, ["serve", "--host=0.0.0.0", "--port=0", "--no-insecure"])
    assert told.exit_code == 1
    assert "refusing to serve on 0.0.0.0" in told.output
    told = CliRunner().invoke(app, ["serve", "--port=0", "--no-insecure", "--insecure"])
    assert told.exit_code == 2
    assert "both given" in " ".join(told.output.split())
