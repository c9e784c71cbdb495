"""`loraplex serve`: one base model, many adapters, the OpenAI API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]

_SPINS = 3000  # tens of microseconds: longer than the gaps within a step, shorter than between two
_MODEL, _HTTP, _ENGINE, _ADAPTERS = "Model", "HTTP", "Engine", "Adapters"


def _option(panel: str, help_text: str, metavar: str | None = None) -> typer.models.OptionInfo:
    # Defaults live in the config alone: a flag that was not given must not hide the file's value.
    info = typer.Option(help=help_text, rich_help_panel=panel, show_default=False, metavar=metavar)
    assert isinstance(info, typer.models.OptionInfo)
    return info


def _hidden(help_text: str) -> typer.models.OptionInfo:
    info = typer.Option(help=help_text, hidden=True)
    assert isinstance(info, typer.models.OptionInfo)
    return info


def serve(
    model: Annotated[
        str | None,
        _option(_MODEL, "Pulled model, Hub id or directory. Default: the default base."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        _option(_MODEL, "Name of the base in requests; repeat for more names."),
    ] = None,
    dtype: Annotated[
        str | None, _option(_MODEL, "auto, bfloat16, float16 or float32. Default: auto.")
    ] = None,
    device: Annotated[
        str | None, _option(_MODEL, "auto, cpu, cuda or cuda:N. Default: auto.")
    ] = None,
    max_model_len: Annotated[
        int | None, _option(_MODEL, "Tokens of prompt and output. Default: the model's own.")
    ] = None,
    host: Annotated[str | None, _option(_HTTP, "Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, _option(_HTTP, "0 takes a free one. Default: 8000.")] = None,
    api_key: Annotated[
        list[str] | None,
        _option(
            _HTTP, "Key for everything; repeat for more. Better: the variable LORAPLEX_API_KEY."
        ),
    ] = None,
    infer_api_key: Annotated[
        list[str] | None, _option(_HTTP, "Key that may generate but not change adapters.")
    ] = None,
    keys: Annotated[
        Path | None,
        _option(_HTTP, "TOML file of keys by hash, with scopes, adapters and limits."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option(
            _HTTP, "Pages from there may call this server; repeatable. Default: none.", "ORIGIN"
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        _option(_HTTP, "Serve off loopback without a key; adapters are then read-only."),
    ] = None,
    drain_timeout: Annotated[
        float | None, _option(_HTTP, "Seconds for running requests on SIGTERM. Default: 30.")
    ] = None,
    max_body_size: Annotated[str | None, _option(_HTTP, "Default: 16MiB.", "SIZE")] = None,
    max_upload_size: Annotated[
        str | None, _option(_HTTP, "Of an adapter. Default: 4GiB.", "SIZE")
    ] = None,
    log_format: Annotated[str | None, _option(_HTTP, "text or json. Default: text.")] = None,
    log_level: Annotated[str | None, _option(_HTTP, "Default: info.")] = None,
    otlp_endpoint: Annotated[
        str | None,
        _option(_HTTP, "Send OpenTelemetry spans there, as http://host:4318/v1/traces.", "URL"),
    ] = None,
    max_batch_size: Annotated[
        int | None, _option(_ENGINE, "Requests of one step. Default: 64.")
    ] = None,
    max_step_tokens: Annotated[
        int | None, _option(_ENGINE, "Tokens of one step. Default: 512; 128 on a CPU.")
    ] = None,
    max_queue: Annotated[
        int | None, _option(_ENGINE, "Waiting requests before 429. Default: 512.")
    ] = None,
    kv_memory: Annotated[
        str | None, _option(_ENGINE, "Of the KV cache, as 2GiB. Default: what fits.", "SIZE")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Share the KV of common prompt beginnings. Default: on.",
            rich_help_panel=_ENGINE,
            show_default=False,
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Record decode steps at start and replay them, on a GPU. Default: on.",
            rich_help_panel=_ENGINE,
            show_default=False,
        ),
    ] = None,
    lora_side_stream: Annotated[
        bool | None,
        typer.Option(
            "--lora-side-stream/--no-lora-side-stream",
            help="Shrink x of adapters beside the base's product, on a GPU. Default: off.",
            rich_help_panel=_ENGINE,
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[str | None, _hidden("native, or reference: PyTorch, to compare.")] = None,
    fuse: Annotated[
        bool | None,
        typer.Option("--fuse/--no-fuse", hidden=True, help="Layers as one list of kernels."),
    ] = None,
    threads: Annotated[int | None, _option(_ENGINE, "CPU threads. Default: torch's.")] = None,
    adapters_dir: Annotated[
        list[Path] | None,
        _option(_ADAPTERS, "Serve every adapter below; clients may load from there. Repeatable."),
    ] = None,
    allow_source: Annotated[
        list[str] | None,
        _option(
            _ADAPTERS,
            "Clients may load from below this hf://, s3://, gs://, az:// or https:// address. "
            "Repeatable. Default: none.",
            "PREFIX",
        ),
    ] = None,
    lora_modules: Annotated[
        list[str] | None, _option(_ADAPTERS, "An adapter to serve; repeatable.", "NAME=PATH")
    ] = None,
    max_loras: Annotated[
        int | None, _option(_ADAPTERS, "Distinct adapters of one step. Default: 64.")
    ] = None,
    max_lora_rank: Annotated[int | None, _option(_ADAPTERS, "Default: any rank that fits.")] = None,
    adapter_memory: Annotated[
        str | None, _option(_ADAPTERS, "Of adapters on the device. Default: what fits.", "SIZE")
    ] = None,
    adapter_host_memory: Annotated[
        str | None, _option(_ADAPTERS, "Of adapters on the host. Default: 2GiB.", "SIZE")
    ] = None,
    state_dir: Annotated[
        Path | None,
        _option(_ADAPTERS, "Where adapters are kept. Default: below $LORAPLEX_HOME, by base."),
    ] = None,
    demos: Annotated[
        bool | None,
        typer.Option(
            "--demos/--no-demos",
            help="Serve the shipped demo adapters. Default: on.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options, e.g. `max-model-len: 2048`.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Flags win over LORAPLEX_* variables (as LORAPLEX_MAX_MODEL_LEN), those over --config.
    """
    flags = {name: value for name, value in locals().items() if name != "config" and _given(value)}
    try:
        _serve(flags, config)
    except KeyboardInterrupt:  # before the server has taken over the signals
        raise typer.Exit(130) from None


def _serve(flags: dict[str, object], config: Path | None) -> None:
    # Else libgomp's threads spin through everything that Python does between two steps, on the
    # cores that the HTTP front waits for. Read once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))

    from loraplex_server.config import ConfigError, resolve_config
    from loraplex_server.listening import bind

    try:
        text = None if config is None else config.read_text(encoding="utf-8")
        resolved = resolve_config(_plain(flags), os.environ, text)
        listening = bind(resolved.http)  # a port in use is told before the model is loaded
    except (ConfigError, OSError) as error:
        raise _failed(error) from None

    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.launch import serve as serve_http
    from loraplex_server.logs import set_up_logging
    from loraplex_server.model.errors import ModelError

    try:
        set_up_logging(resolved.http)
        serve_http(resolved, listening, say=typer.echo)
    except (ModelError, StoreError, ValueError, OSError) as error:
        raise _failed(error) from None


def _failed(error: Exception) -> typer.Exit:
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(1)


def _given(value: object) -> bool:
    return value is not None and value != []


def _plain(flags: dict[str, object]) -> dict[str, object]:
    """Paths as text: the config parses what every source can say."""
    return {
        name: [str(item) for item in value] if isinstance(value, list) else _text(value)
        for name, value in flags.items()
    }


def _text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
