"""The sources of the settings, resolved once at start.

    command line flags  >  LORAPLEX_* environment  >  --config file.yaml  >  defaults

Every option has one name: ``--max-model-len``, ``LORAPLEX_MAX_MODEL_LEN``, ``max-model-len:``.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from loraplex_server.engine.config import EngineConfig
from loraplex_server.options import Option, Options, Panel, option, options

from .api_keys import ApiKey, Scope, parse_keys
from .config import ConfigError, HttpConfig, LearningConfig, ServerConfig, StoreConfig
from .vllm_flags import advice


def _secrets(value: object) -> object:
    secrets = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(secrets, list | tuple) and any(len(str(secret)) < 8 for secret in secrets):
        raise ValueError("a key must have at least 8 characters")
    return secrets


def _key_file(value: object) -> object:
    path = Path(str(value)).expanduser()
    try:
        return parse_keys(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


_Secrets = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_secrets)]


class _KeyOptions(Options, panel=Panel.HTTP):
    """The secrets of the options; ``HttpConfig.api_keys`` has their hashes."""

    api_key: _Secrets = option(
        (),
        "Accept this API key with all rights. Repeat the option for several. LORAPLEX_API_KEY "
        "hides the key from the process list.",
    )
    infer_api_key: _Secrets = option(
        (),
        "Accept this API key for generating text, but not for changing adapters. Repeat the "
        "option for several.",
    )
    metrics_key: _Secrets = option(
        (),
        "Accept this API key only for reading /metrics, for Prometheus. Repeat the option for "
        "several.",
    )
    keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_key_file)] = option(
        (),
        "Read the hashes of API keys, their scopes, adapters and limits from this TOML file.",
        metavar="FILE",
    )

    def api_keys(self) -> tuple[ApiKey, ...]:
        by_scope = {
            Scope.ADMIN: self.api_key,
            Scope.INFER: self.infer_api_key,
            Scope.METRICS: self.metrics_key,
        }
        keys = [
            ApiKey.of(secret, scope) for scope, secrets in by_scope.items() for secret in secrets
        ]
        return (*keys, *self.keys)


_OWNERS = (ServerConfig, HttpConfig, _KeyOptions, EngineConfig, StoreConfig, LearningConfig)


@cache
def server_options() -> tuple[Option, ...]:
    """Return every option of `loraplex serve`, grouped by owner."""
    return tuple(options(_OWNERS))


def resolve_config(flags: Mapping[str, object], config_file: Path | None = None) -> ServerConfig:
    """Merge ``flags`` (only those of the command line), the environment and ``config_file``.

    Raises ConfigError, which names the option and never repeats a secret.
    """
    known = {each.name: each for each in server_options()}
    for name in flags:
        if name not in known:
            raise ConfigError(f"the command line sets {name!r}, {_no_option(name)}")
    try:
        settings = _settings_class(config_file)(**flags)
        by_owner: dict[type[Options], dict[str, Any]] = {owner: {} for owner in _OWNERS}
        for name in settings.model_fields_set:
            by_owner[known[name].owner][known[name].field] = getattr(settings, name)
        api_keys = _KeyOptions.model_construct(**by_owner[_KeyOptions]).api_keys()
        return ServerConfig(
            **by_owner[ServerConfig],
            http=HttpConfig(**by_owner[HttpConfig], api_keys=api_keys),
            engine=EngineConfig(**by_owner[EngineConfig]),
            store=StoreConfig(**by_owner[StoreConfig]),
            learning=LearningConfig(**by_owner[LearningConfig]),
        )
    except ValidationError as error:
        raise ConfigError(_problem(error)) from None


class _Settings(BaseSettings):
    """All options in one model. Each field is declared by its owner."""

    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_",
        env_ignore_empty=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        coerce_numbers_to_str=True,
        validate_default=False,
    )
    config_file: ClassVar[Path | None] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if cls.config_file is None:
            return init_settings, env_settings
        return init_settings, env_settings, _YamlFile(settings_cls, cls.config_file)


class _YamlFile(YamlConfigSettingsSource):
    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        return read_yaml(file_path)


def read_yaml(file: Path | Traversable) -> dict[str, Any]:
    """Read a mapping whose names have dashes or underscores. Raises ConfigError."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the config file cannot be read: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError("the config file must hold a mapping of option names to values")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _settings_class(config_file: Path | None) -> type[_Settings]:
    fields: dict[str, Any] = {
        each.name: (each.info.annotation, each.info) for each in server_options()
    }
    settings_class = create_model("Settings", __base__=_Settings, **fields)
    settings_class.config_file = config_file
    return settings_class


def _no_option(name: str) -> str:
    known = [each.dashed for each in server_options()]
    near = get_close_matches(name.replace("_", "-"), known, n=1)
    hint = advice(name) or (f"did you mean {near[0]}?" if near else "see `loraplex serve --help`")
    return f"which is not an option: {hint}"


def _problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"the config file sets {name!r}, {_no_option(name)}"
    if not name:
        return message
    is_secret = name.endswith("key") or name == "catalogue"  # a URL may hold a password
    if name == "keys":  # its messages begin with the file
        return f"keys: {message}"
    shown = "…" if is_secret else repr(problem["input"])
    return f"{name.replace('_', '-')} is {shown}: {message[:1].lower()}{message[1:]}"
