"""The server's settings: frozen values, grouped by owner. ``sources`` resolves them."""

import ipaddress
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, DirectoryPath, Field, model_validator
from pydantic_settings import NoDecode

from loraplex_adapter_store.catalogue.bucket import check_url
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.sources.prefix import SourcePrefix
from loraplex_server.engine.config import EngineConfig
from loraplex_server.images import ImageLimits
from loraplex_server.options import Bytes, Options, Panel, Paths, Seconds, Texts, option

from .api_keys import ApiKey

MAX_INPUTS = 16_384  # texts of one call, at most: they are checked in one turn of the event loop


class ConfigError(ValueError):
    """A bad value, which stops the start. The message names the option and the value."""


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


def _each(parse: Callable[[str], object]) -> BeforeValidator:
    """Parse the texts of a list, or of a text with commas. Parsed items stay."""

    def parse_all(value: object) -> object:
        if isinstance(value, str):
            items: object = [value] if value.lstrip().startswith("{") else value.split(",")
        else:
            items = value
        if not isinstance(items, list | tuple):
            return value
        return tuple(parse(item.strip()) if isinstance(item, str) else item for item in items)

    return BeforeValidator(parse_all)


def _web_prefix(text: str) -> SourcePrefix:
    prefix = SourcePrefix.parse(text)
    if not prefix.text.startswith(("https://", "http://")):
        raise ValueError(f"{text!r} is no web address; give https:// or http://, and a host")
    return prefix


class HttpConfig(Options, panel=Panel.HTTP):
    served_model_names: Texts = option(
        (),
        "Accept this name of the base model in requests. Repeat the option for several. Default: "
        "the model's own name.",
        panel=Panel.MODEL,
        name="served_model_name",
    )
    host: str = option("127.0.0.1", "Listen on this address.")
    port: int = option(8000, "Listen on this port. 0 chooses a free one.", ge=0, le=65535)
    cors_origins: Texts = option(
        (),
        "Allow web pages of this origin, scheme://host[:port], to call the server. Repeat the "
        "option for several.",
        name="cors_origin",
        metavar="ORIGIN",
    )
    insecure: bool = option(
        False, "Allow other machines to connect without an API key. Adapters are then read-only."
    )
    public_metrics: bool = option(
        False,
        "Allow everybody to read /metrics without an API key. Use this on closed networks only.",
    )
    max_body_bytes: Bytes = option(
        16 << 20,
        "Accept request bodies up to this number of bytes. Uploads have a limit of their own.",
        name="max_body_size",
    )
    max_upload_bytes: Bytes = option(
        4 << 30, "Accept uploads of adapters up to this number of bytes.", name="max_upload_size"
    )
    response_store_bytes: Bytes = option(
        64 << 20,
        "Keep stored responses of /v1/responses in this number of bytes of memory. 0 stores none.",
        name="response_store_size",
    )
    response_ttl_s: Seconds = option(
        86400.0,
        "Delete a stored response of /v1/responses after this number of seconds.",
        name="response_ttl",
    )
    max_batch_file_bytes: Bytes = option(
        200 << 20,
        "Accept files of batches and of training examples up to this number of bytes.",
        name="max_batch_file_size",
    )
    max_connections: int = option(
        1024,
        "Answer at most this number of connections at once; further requests get a 503. Idle "
        "connections are closed, the longest idle first, if new ones need the room.",
        ge=1,
    )
    max_running: int | None = option(
        None, "Run at most this number of requests of a tenant at once. Default: no limit.", ge=1
    )
    max_choices: int = option(
        128,
        "Accept at most this number of completions in a call: its prompts times n.",
        ge=1,
        le=MAX_INPUTS,
    )
    max_inputs: int = option(
        2048,
        "Accept at most this number of texts in a call for embeddings, classes or scores.",
        ge=1,
        le=MAX_INPUTS,
    )
    max_images: int = option(32, "Accept at most this number of images in a request.", ge=1)
    max_image_bytes: Bytes = option(
        10 << 20, "Accept images up to this number of bytes each.", name="max_image_size"
    )
    max_image_pixels: int = option(
        16 << 20,
        "Accept images up to this number of pixels each: width times height.",
        ge=1,
        le=1 << 26,
    )
    allow_image_urls: Annotated[tuple[SourcePrefix, ...], NoDecode, _each(_web_prefix)] = option(
        (),
        "Fetch images of requests below this address, such as https://images.example.org. Repeat "
        "the option for several. Without it, no image is fetched.",
        name="allow_image_url",
        metavar="PREFIX",
    )
    drain_timeout_s: Seconds = option(
        30.0,
        "Let running requests finish for this number of seconds after SIGTERM.",
        name="drain_timeout",
    )
    console: bool = option(True, "Serve the web console at / and the guide at /guide.")
    show_prompts: bool = option(
        False, "Show the first characters of prompts in /v1/requests and in the console."
    )
    log_format: Literal["text", "json"] = option("text", "Write the log as text or json.")
    log_level: str = option(
        "info", "Log messages of this level and above: debug, info, warning or error."
    )
    otlp_endpoint: str | None = option(
        None,
        "Send OpenTelemetry spans over HTTP to this URL, such as http://host:4318/v1/traces.",
        metavar="URL",
    )
    api_keys: tuple[ApiKey, ...] = ()  # from --api-key, --infer-api-key, --metrics-key and --keys
    ping_interval_s: float = 10.0  # between the comments that keep an idle stream open
    job_wait_s: float = 10.0  # a load that takes longer is answered with a job
    stall_s: float = 120.0  # /health fails when a step has taken longer

    @property
    def writes_open(self) -> bool:
        """True if adapters may be changed without a key: only this machine can connect."""
        return not self.api_keys and is_loopback(self.host)

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(
            self.max_image_bytes, self.max_image_pixels, self.max_images, self.allow_image_urls
        )

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


_MODULE_JSON = '{"name": …, "path": …}'


def _module(text: str) -> LoraModule:
    if text.startswith("{"):  # of vLLM; "base_model_name" is the served base for all adapters
        try:
            given = json.loads(text)
            name, path = str(given.pop("name")), str(given.pop("path"))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{text!r} must have the form {_MODULE_JSON}: {error}") from None
        if given.keys() - {"base_model_name"}:
            raise ValueError(f"{text!r} must have the form {_MODULE_JSON}")
    else:
        name, _, path = text.partition("=")
    if not (name and path):
        raise ValueError(f"{text!r} must have the form name=path or {_MODULE_JSON}")
    return LoraModule(name, Path(path).expanduser())


def _catalogue(value: object) -> object:
    return check_url(value) if isinstance(value, str) else value


class StoreConfig(Options, panel=Panel.ADAPTERS):
    adapters_dirs: Paths = option(
        (),
        "Serve all adapters of this folder and watch it. Clients may load from it. Repeat the "
        "option for several.",
        name="adapters_dir",
    )
    allow_sources: Annotated[tuple[SourcePrefix, ...], NoDecode, _each(SourcePrefix.parse)] = (
        option(
            (),
            "Allow clients to load adapters below this address: hf://, s3://, gs://, az:// or "
            "https://. Repeat the option for several.",
            name="allow_source",
            metavar="PREFIX",
        )
    )
    lora_modules: Annotated[tuple[LoraModule, ...], NoDecode, _each(_module)] = option(
        (),
        "Serve this adapter from the start, as name=path or vLLM's JSON. Repeat the option, or "
        "give several values.",
        metavar="NAME=PATH",
    )
    memory_bytes: Bytes | None = option(
        None,
        "Cache adapters in this number of bytes of host memory. Default: 2GiB; with a GPU, a "
        "quarter of the free memory.",
        name="adapter_host_memory",
    )
    root: Path | None = option(
        None,
        "Store adapters, files and batches in this folder. Default: adapters/HASH-OF-BASE in "
        "$LORAPLEX_HOME (~/.cache/loraplex).",
        name="state_dir",
    )
    demos: bool = option(True, "Serve the demo adapters of the package.")
    refuse_other_base: bool = option(
        False, "Refuse adapters whose config names another base model than the one served."
    )
    keep_revisions: int = option(
        3,
        "Keep this number of older contents of each name, for rollback and name@digest.",
        ge=0,
    )
    catalogue: Annotated[str, BeforeValidator(_catalogue)] | None = option(
        None,
        "Share names and adapters with other servers in this object store: s3://bucket/prefix, "
        "gs://, az:// or file:///directory. Credentials come from the environment.",
        metavar="URL",
    )
    catalogue_disk_bytes: Bytes = option(
        64 << 30,
        "Cache adapters of the catalogue in this number of bytes on disk. Others are fetched on "
        "use.",
        name="catalogue_disk",
    )
    catalogue_refresh_s: Seconds = option(
        1.0,
        "Answer a name from memory for this number of seconds before the catalogue is read again.",
        name="catalogue_refresh",
    )
    catalogue_outage_s: Seconds = option(
        300.0,
        "Serve known names for this number of seconds while the catalogue cannot be reached. "
        "Then they answer 503.",
        name="catalogue_outage",
    )

    @property
    def catalogue_limits(self) -> CatalogueLimits:
        return CatalogueLimits(
            refresh_s=self.catalogue_refresh_s,
            stale_s=self.catalogue_outage_s,
            disk_bytes=self.catalogue_disk_bytes,
        )


class LearningConfig(Options, panel=Panel.ADAPTERS):
    """Adapters from a sentence, and adapters that learn from examples beside serving."""

    generator_dir: DirectoryPath | None = option(
        None,
        "Folder of SG-LoRA and ICM-LoRA as `loraplex generator train` fitted them. Default: "
        "sg-lora mixes the adapters that the server holds.",
    )
    threads: int | None = option(
        None,
        "Learn and train on this number of CPU threads, at low priority. Default: one for each "
        "core. 0 turns learning off.",
        name="learning_threads",
        ge=0,
    )
    share: float = option(
        0.1,
        "Spend this share of the time on learning and training while requests are served on the "
        "CPU. An idle server learns all the time.",
        name="learning_share",
        gt=0,
        le=1,
    )
    max_budget_s: Seconds = option(
        600.0,
        "Let an adapter learn for at most this number of seconds: the largest budget_s of a "
        "request.",
        name="max_learning_time",
    )
    allow_training: bool = option(
        False,
        "Allow clients to train adapters on their own examples (/v1/fine_tuning/jobs and "
        "/v1/adapters/train), on --learning-threads cores.",
    )
    max_training_clients: int = option(
        16,
        "Hold at most this number of adapters that clients train step by step, with Tinker's API.",
        ge=1,
    )
    session_timeout_s: Seconds = option(
        300.0,
        "End a session of Tinker's API that was silent for this number of seconds, and free its "
        "adapters.",
        name="session_timeout",
    )

    @property
    def n_threads(self) -> int:
        """The number of threads; ``OMP_NUM_THREADS`` bounds it as it bounds torch."""
        if self.threads is not None:
            return self.threads
        return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.allow_training and self.threads == 0:
            raise ValueError("allow-training needs learning-threads of at least 1, which is 0")
        return self


class ServerConfig(Options, panel=Panel.MODEL):
    model: str | None = option(
        None,
        "Serve this base model: a pulled model, a Hub id, a folder or a GGUF file. Default: "
        "SmolLM2-135M-Instruct, which is downloaded if it is missing.",
    )
    http: HttpConfig = Field(default_factory=HttpConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    learning: LearningConfig = Field(default_factory=LearningConfig)
