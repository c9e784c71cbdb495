"""The server's settings: frozen values, composed by owner. ``settings_sources`` resolves them."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, DirectoryPath, Field, model_validator
from pydantic_settings import NoDecode

from loraplex_adapter_store.catalogue.bucket import check_url
from loraplex_adapter_store.catalogue.limits import CatalogueLimits
from loraplex_adapter_store.sources.prefix import SourcePrefix
from loraplex_server.engine.config import EngineConfig

from .api_keys import ApiKey
from .options import Bytes, Options, Panel, Paths, Seconds, Texts, option

__all__ = [
    "MAX_INPUTS",
    "ConfigError",
    "HttpConfig",
    "LearningConfig",
    "LoraModule",
    "ServerConfig",
    "StoreConfig",
    "is_loopback",
]

MAX_INPUTS = 16_384  # texts of one call, whatever is configured: all are checked in one turn


class ConfigError(ValueError):
    """A bad value stops the start; the message names the option and the value."""


class LoraModule(NamedTuple):
    name: str
    path: Path


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HttpConfig(Options):
    served_model_names: Texts = option(
        (),
        "Name of the base in requests; repeat for more names. Default: the model's own.",
        Panel.MODEL,
        name="served_model_name",
    )
    host: str = option("127.0.0.1", "Address to listen on.", Panel.HTTP)
    port: int = option(8000, "0 takes a free one.", Panel.HTTP, ge=0, le=65535)
    cors_origins: Texts = option(
        (),
        "Pages from there may call this server; repeatable.",
        Panel.HTTP,
        name="cors_origin",
        metavar="ORIGIN",
    )
    insecure: bool = option(
        False, "Serve off loopback without a key; adapters are then read-only.", Panel.HTTP
    )
    public_metrics: bool = option(
        False,
        "Read /metrics without a key, as endpoint pickers of gateways do; for closed networks.",
        Panel.HTTP,
    )
    max_body_bytes: Bytes = option(
        16 << 20, "Of a request.", Panel.HTTP, name="max_body_size", metavar="SIZE"
    )
    max_upload_bytes: Bytes = option(
        4 << 30, "Of an adapter.", Panel.HTTP, name="max_upload_size", metavar="SIZE"
    )
    response_store_bytes: Bytes = option(
        64 << 20,
        "Memory for the responses of /v1/responses; 0 keeps none.",
        Panel.HTTP,
        name="response_store_size",
        metavar="SIZE",
    )
    response_ttl_s: Seconds = option(
        86400.0, "How long they are kept.", Panel.HTTP, name="response_ttl"
    )
    max_batch_file_bytes: Bytes = option(
        200 << 20, "Of a file of calls.", Panel.HTTP, name="max_batch_file_size", metavar="SIZE"
    )
    max_connections: int = option(
        1024, "Open connections before new requests get a 503.", Panel.HTTP, ge=1
    )
    max_running: int | None = option(
        None, "Requests of a tenant that run at once. Default: no limit.", Panel.HTTP, ge=1
    )
    max_choices: int = option(
        128, "Prompts × n of one call.", Panel.HTTP, hidden=True, ge=1, le=MAX_INPUTS
    )
    max_inputs: int = option(
        2048,
        "Texts of one call for vectors, classes or scores.",
        Panel.HTTP,
        hidden=True,
        ge=1,
        le=MAX_INPUTS,
    )
    ping_interval_s: Seconds = option(
        10.0, "Between comments of an idle stream.", Panel.HTTP, name="ping_interval", hidden=True
    )
    drain_timeout_s: Seconds = option(
        30.0, "Seconds for running requests on SIGTERM.", Panel.HTTP, name="drain_timeout"
    )
    console: bool = option(True, "For browsers: a console at /, the guide at /guide.", Panel.HTTP)
    show_prompts: bool = option(
        False, "Show the beginnings of prompts at /v1/requests and in the console.", Panel.HTTP
    )
    log_format: Literal["text", "json"] = option("text", "text or json.", Panel.HTTP)
    log_level: str = option("info", "debug, info, warning or error.", Panel.HTTP)
    otlp_endpoint: str | None = option(
        None,
        "Send OpenTelemetry spans to this URL: http, port 4318, /v1/traces, as a rule.",
        Panel.HTTP,
        metavar="URL",
    )
    api_keys: tuple[ApiKey, ...] = ()  # of --api-key, --infer-api-key, --metrics-key and --keys
    job_wait_s: float = 10.0  # how long a load is waited for before it is answered with a job
    stall_s: float = 120.0  # a running step older than this makes /health fail

    @property
    def writes_open(self) -> bool:
        """Whether adapters may be changed without a key: only while nobody else can connect."""
        return not self.api_keys and is_loopback(self.host)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"refusing to serve on {self.host} without authentication: give --api-key, bind "
                "to 127.0.0.1, or say --insecure (which leaves the adapters read-only)"
            )
        ids = [key.id for key in self.api_keys]
        if len(set(ids)) != len(ids) or len({key.sha256 for key in self.api_keys}) != len(ids):
            raise ValueError("an API key is given twice, by --api-key, --infer-api-key or --keys")
        for origin in self.cors_origins:
            if origin == "*" and not self.api_keys:
                raise ValueError(
                    "cors-origin is '*': any web page could use this server; add --api-key"
                )
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s*]+", origin):
                raise ValueError(
                    f"cors-origin is {origin!r}; an origin is scheme://host[:port] without a path"
                )
        return self


def _modules(value: object) -> object:
    """``name=path`` texts, as a list or with commas."""
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    modules = []
    for text in texts:
        if isinstance(text, LoraModule):
            modules.append(text)
            continue
        name, separator, path = str(text).strip().partition("=")
        if not (separator and name and path):
            raise ValueError(f"{text!r} must have the form name=path")
        modules.append(LoraModule(name, Path(path).expanduser()))
    return tuple(modules)


def _prefixes(value: object) -> object:
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    return tuple(
        text if isinstance(text, SourcePrefix) else SourcePrefix.parse(str(text).strip())
        for text in texts
    )


def _catalogue(value: object) -> object:
    return check_url(value) if isinstance(value, str) else value


class StoreConfig(Options):
    adapters_dirs: Paths = option(
        (),
        "Serve every adapter below, watched; clients may load from there. Repeatable.",
        Panel.ADAPTERS,
        name="adapters_dir",
    )
    allow_sources: Annotated[tuple[SourcePrefix, ...], NoDecode, BeforeValidator(_prefixes)] = (
        option(
            (),
            "Clients may load from below this hf://, s3://, gs://, az:// or https:// address. "
            "Repeatable.",
            Panel.ADAPTERS,
            name="allow_source",
            metavar="PREFIX",
        )
    )
    lora_modules: Annotated[tuple[LoraModule, ...], NoDecode, BeforeValidator(_modules)] = option(
        (),
        "An adapter to serve, as name=path; repeatable, or with commas.",
        Panel.ADAPTERS,
        metavar="NAME=PATH",
    )
    memory_bytes: Bytes | None = option(
        None,
        "Of adapters on the host. Default: 2GiB; beside a GPU a quarter of the free memory.",
        Panel.ADAPTERS,
        name="adapter_host_memory",
        metavar="SIZE",
    )
    root: Path | None = option(
        None,
        "Where adapters are kept. Default: adapters/ and the hash of the base, below "
        "$LORAPLEX_HOME (~/.cache/loraplex).",
        Panel.ADAPTERS,
        name="state_dir",
    )
    demos: bool = option(True, "Serve the shipped demo adapters.", Panel.ADAPTERS)
    keep_revisions: int = option(
        3,
        "Older contents of each name that stay, for rollback and name@digest.",
        Panel.ADAPTERS,
        ge=0,
    )
    catalogue: Annotated[str, BeforeValidator(_catalogue)] | None = option(
        None,
        "Share names and adapters with the servers that have the same one: s3://bucket/prefix, "
        "gs://, az:// or file:///directory. Credentials come from the environment.",
        Panel.ADAPTERS,
        metavar="URL",
    )
    catalogue_disk_bytes: Bytes = option(
        64 << 30,
        "Of the catalogue's adapters on this disk; what is not there is fetched when asked for.",
        Panel.ADAPTERS,
        name="catalogue_disk",
        metavar="SIZE",
    )
    catalogue_refresh_s: Seconds = option(
        1.0,
        "How long a name is answered from memory before the catalogue is asked again.",
        Panel.ADAPTERS,
        name="catalogue_refresh",
    )
    catalogue_outage_s: Seconds = option(
        300.0,
        "The same while the catalogue cannot be reached; then its names answer 503.",
        Panel.ADAPTERS,
        name="catalogue_outage",
    )

    @property
    def catalogue_limits(self) -> CatalogueLimits:
        return CatalogueLimits(
            refresh_s=self.catalogue_refresh_s,
            stale_s=self.catalogue_outage_s,
            disk_bytes=self.catalogue_disk_bytes,
        )


class LearningConfig(Options):
    """Of adapters from a sentence, and of those that learn from examples beside serving."""

    generator_dir: DirectoryPath | None = option(
        None,
        "Library and generator that sentences are answered with. Default: those of the default "
        "base.",
        Panel.ADAPTERS,
    )
    threads: int = option(
        1,
        "Cores for adapters that learn from examples, at low priority; 0: none may.",
        Panel.ADAPTERS,
        name="learning_threads",
        ge=0,
    )
    share: float = option(
        0.1,
        "Share of the time that such adapters learn for while requests are answered on the same "
        "cores. When nobody waits they learn all the time.",
        Panel.ADAPTERS,
        name="learning_share",
        gt=0,
        le=1,
    )
    max_budget_s: Seconds = option(
        600.0,
        "Seconds that a request may let an adapter learn for.",
        Panel.ADAPTERS,
        name="max_learning_time",
    )

    allow_training: bool = option(
        False,
        "Clients may train adapters on chats of theirs (POST /v1/adapters/train): on "
        "--learning-threads cores, in a process that has a copy of the base.",
        Panel.ADAPTERS,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.allow_training and self.threads == 0:
            raise ValueError("allow-training needs learning-threads of at least 1, which is 0")
        return self


class ServerConfig(Options):
    model: str | None = option(
        None, "Pulled model, Hub id or directory. Default: the default base.", Panel.MODEL
    )
    http: HttpConfig = Field(default_factory=HttpConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    learning: LearningConfig = Field(default_factory=LearningConfig)
