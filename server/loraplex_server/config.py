"""The server's configuration: frozen values, composed by owner, resolved once at start.

    command line flags  >  LORAPLEX_* environment  >  --config file.yaml  >  defaults

Every option has one name: ``--max-model-len``, ``LORAPLEX_MAX_MODEL_LEN``, ``max-model-len:``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from loraplex_adapter_store.sources.prefix import SourcePrefix
from loraplex_server.engine.config import EngineConfig

from .api_keys import ApiKey, Scope, parse_keys

__all__ = [
    "ConfigError",
    "HttpConfig",
    "LoraModule",
    "ServerConfig",
    "StoreConfig",
    "is_loopback",
    "resolve_config",
]


class ConfigError(ValueError):
    """A bad value stops the start; the message names the option and where it came from."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class HttpConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()  # empty: the model's own name
    api_keys: tuple[ApiKey, ...] = ()
    insecure: bool = False  # serve off loopback without a key
    cors_origins: tuple[str, ...] = ()  # whose pages may call from a browser
    max_body_bytes: int = 16 << 20
    max_upload_bytes: int = 4 << 30
    max_choices: int = 128  # prompts × n of one call
    ping_interval_s: float = 10.0
    job_wait_s: float = 10.0  # how long a load is waited for before it is answered with a job
    drain_timeout_s: float = 30.0
    stall_s: float = 120.0  # a running step older than this makes /health fail
    log_format: str = "text"
    log_level: str = "info"
    otlp_endpoint: str | None = None  # where spans go; None: no tracing

    @property
    def writes_open(self) -> bool:
        """Whether adapters may be changed without a key: only while nobody else can connect."""
        return not self.api_keys and is_loopback(self.host)

    def __post_init__(self) -> None:
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"refusing to serve on {self.host} without authentication: give --api-key, bind "
                "to 127.0.0.1, or say --insecure (which leaves the adapters read-only)"
            )
        ids = [key.id for key in self.api_keys]
        if len(set(ids)) != len(ids) or len({key.sha256 for key in self.api_keys}) != len(ids):
            raise ConfigError("an API key is given twice, by --api-key, --infer-api-key or --keys")
        for origin in self.cors_origins:
            if origin == "*" and not self.api_keys:
                raise ConfigError(
                    "cors-origin is '*': any web page could use this server; add --api-key"
                )
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s*]+", origin):
                raise ConfigError(
                    f"cors-origin is {origin!r}; an origin is scheme://host[:port] without a path"
                )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must lie between 0 and 65535")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log-format is {self.log_format!r}; choose text or json")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    root: Path | None = None  # None: a directory under the user's cache, one for each base
    adapters_dirs: tuple[Path, ...] = ()  # clients may load from below these
    allow_sources: tuple[SourcePrefix, ...] = ()  # and from below these addresses
    lora_modules: tuple[LoraModule, ...] = ()
    demos: bool = True  # register the adapters that are shipped
    memory_bytes: int = 2 << 30  # of folded plans on the host


@dataclass(frozen=True, slots=True)
class ServerConfig:
    http: HttpConfig = field(default_factory=HttpConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    model: str | None = None  # directory, Hub id; None: the default base


Value = object  # as it comes: text from flags and environment, any YAML value from the file
Settings = dict[str, Value]


def resolve_config(
    flags: Mapping[str, Value], environment: Mapping[str, str], file_text: str | None = None
) -> ServerConfig:
    """Reads nothing but the --keys file. ``flags`` hold only what was given. Raises ConfigError."""
    from_file = _read_file(file_text)
    from_environment = _read_environment(environment)
    from_flags = _known(flags, "the command line")
    settings = {**from_file, **from_environment, **from_flags}
    parsed = {name: _parse(name, value) for name, value in settings.items() if value is not None}
    return _compose(parsed)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read_file(text: str | None) -> Settings:
    if text is None:
        return {}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError("the config file must hold a mapping of option names to values")
    return _known({str(key).replace("-", "_"): item for key, item in value.items()}, "the file")


def _read_environment(environment: Mapping[str, str]) -> Settings:
    prefix = "LORAPLEX_"
    given = {
        key.removeprefix(prefix).lower(): value
        for key, value in environment.items()
        if key.startswith(prefix) and value != ""
    }
    # Other programs of ours have variables too, so unknown ones are no error here.
    return {name: value for name, value in given.items() if name in _OPTIONS}


def _known(settings: Mapping[str, Value], where: str) -> Settings:
    for name in settings:
        if name not in _OPTIONS:
            known = ", ".join(option.replace("_", "-") for option in sorted(_OPTIONS))
            raise ConfigError(f"{where} sets {name!r}, which is no option; known: {known}")
    return dict(settings)


def _parse(name: str, value: Value) -> object:
    try:
        return _OPTIONS[name](value)
    except (ValueError, TypeError) as error:
        shown = "…" if "key" in name else repr(value)
        raise ConfigError(f"{name.replace('_', '-')} is {shown}: {error}") from error


def _compose(options: Mapping[str, object]) -> ServerConfig:
    def take(names: Mapping[str, str]) -> dict[str, object]:
        return {field: options[name] for name, field in names.items() if name in options}

    http = take(_HTTP)
    keys = [*_keys(options, "api_key", Scope.INFER, Scope.ADMIN)]
    keys += _keys(options, "infer_api_key", Scope.INFER)
    keys += options.get("keys", ())  # type: ignore[arg-type]
    try:
        return ServerConfig(
            http=HttpConfig(**http, api_keys=tuple(keys)),  # type: ignore[arg-type]  # parsed above
            engine=EngineConfig(**take(_ENGINE)),  # type: ignore[arg-type]
            store=StoreConfig(**take(_STORE)),  # type: ignore[arg-type]
            model=options.get("model"),  # type: ignore[arg-type]
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _keys(options: Mapping[str, object], name: str, *scopes: Scope) -> list[ApiKey]:
    secrets = options.get(name, ())
    assert isinstance(secrets, tuple)
    return [ApiKey.of(secret, *scopes) for secret in secrets]


def _text(value: Value) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
        raise ValueError("a text is needed")
    return str(value)


def _texts(value: Value) -> tuple[str, ...]:
    """A list, or one text with commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        return tuple(_text(item) for item in value)
    raise TypeError("a list of texts is needed")


def _secrets(value: Value) -> tuple[str, ...]:
    secrets = _texts(value)
    if any(len(secret) < 8 for secret in secrets):
        raise ValueError("a key must have at least 8 characters")
    return secrets


def _key_file(value: Value) -> tuple[ApiKey, ...]:
    path = _path(value)
    try:
        return parse_keys(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _integer(value: Value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number is needed")
    return int(value)


def _number(value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is needed")
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError("a number of zero or more is needed")
    return number


def _flag(value: Value) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("true or false is needed")
    return words[str(value).lower()]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _bytes(value: Value) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(value).lower())
    if match is None or isinstance(value, bool):
        raise ValueError("a size such as 512MiB or 2GB is needed")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _paths(value: Value) -> tuple[Path, ...]:
    return tuple(Path(text).expanduser() for text in _texts(value))


def _path(value: Value) -> Path:
    return Path(_text(value)).expanduser()


def _prefixes(value: Value) -> tuple[SourcePrefix, ...]:
    return tuple(SourcePrefix.parse(text) for text in _texts(value))


def _modules(value: Value) -> tuple[LoraModule, ...]:
    modules = []
    for text in _texts(value):
        name, separator, path = text.partition("=")
        if not (separator and name and path):
            raise ValueError(f"{text!r} must have the form name=path")
        modules.append(LoraModule(name, Path(path).expanduser()))
    return tuple(modules)


# option → parser; the three tables below say whose field it fills
_OPTIONS: Mapping[str, Callable[[Value], object]] = {
    "model": _text,
    "served_model_name": _texts,
    "host": _text,
    "port": _integer,
    "api_key": _secrets,
    "infer_api_key": _secrets,
    "keys": _key_file,
    "cors_origin": _texts,
    "insecure": _flag,
    "max_body_size": _bytes,
    "max_upload_size": _bytes,
    "max_choices": _integer,
    "ping_interval": _number,
    "drain_timeout": _number,
    "log_format": _text,
    "log_level": _text,
    "otlp_endpoint": _text,
    "device": _text,
    "dtype": _text,
    "max_model_len": _integer,
    "max_batch_size": _integer,
    "max_step_tokens": _integer,
    "max_queue": _integer,
    "kv_memory": _bytes,
    "adapter_memory": _bytes,
    "max_loras": _integer,
    "max_lora_rank": _integer,
    "page_size": _integer,
    "prefix_cache": _flag,
    "cuda_graphs": _flag,
    "lora_side_stream": _flag,
    "kernels": _text,
    "fuse": _flag,
    "threads": _integer,
    "state_dir": _path,
    "adapters_dir": _paths,
    "allow_source": _prefixes,
    "lora_modules": _modules,
    "demos": _flag,
    "adapter_host_memory": _bytes,
}

_HTTP = {
    "host": "host",
    "port": "port",
    "served_model_name": "served_model_names",
    "insecure": "insecure",
    "cors_origin": "cors_origins",
    "max_body_size": "max_body_bytes",
    "max_upload_size": "max_upload_bytes",
    "max_choices": "max_choices",
    "ping_interval": "ping_interval_s",
    "drain_timeout": "drain_timeout_s",
    "log_format": "log_format",
    "log_level": "log_level",
    "otlp_endpoint": "otlp_endpoint",
}
_ENGINE = {
    "device": "device",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_batch_size": "max_batch_size",
    "max_step_tokens": "max_step_tokens",
    "max_queue": "max_queue",
    "kv_memory": "kv_memory_bytes",
    "adapter_memory": "adapter_memory_bytes",
    "max_loras": "max_loras",
    "max_lora_rank": "max_lora_rank",
    "page_size": "page_size",
    "prefix_cache": "prefix_cache",
    "cuda_graphs": "cuda_graphs",
    "lora_side_stream": "lora_side_stream",
    "kernels": "kernels",
    "fuse": "fuse",
    "threads": "threads",
}
_STORE = {
    "state_dir": "root",
    "adapters_dir": "adapters_dirs",
    "allow_source": "allow_sources",
    "lora_modules": "lora_modules",
    "demos": "demos",
    "adapter_host_memory": "memory_bytes",
}
