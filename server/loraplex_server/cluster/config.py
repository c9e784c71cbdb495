"""The cluster file: number and resources of processes, and the server's options.

    server:              # options of `loraplex serve`
      port: 8000
    gateways: {replicas: 2}
    engines: {replicas: 2, cpus: 1}

Every key has a default. Unknown keys and bad values prevent the start.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraplex_server.model.loading.pull import loraplex_home
from loraplex_server.options import Bytes
from loraplex_server.settings.config import ConfigError, ServerConfig
from loraplex_server.settings.sources import read_yaml, resolve_config

_Count = Annotated[int, Field(ge=1)]
_Cpus = Annotated[float, Field(gt=0)]
_Seconds = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewaysConfig(_Part):
    replicas: _Count = 2
    cpus: _Cpus = 0.2  # in Ray's count, which decides how many processes fit a node
    max_requests: _Count = 1024  # concurrent, in each gateway


class EnginesConfig(_Part):
    replicas: _Count = 2
    max_replicas: _Count | None = None  # for autoscaling above ``replicas``
    min_replicas: Annotated[int, Field(ge=0)] | None = None  # 0: none without requests
    requests_per_replica: _Count = 32  # running and waiting; the target of autoscaling
    upscale_delay_s: _Seconds = 5.0
    downscale_delay_s: _Seconds = 600.0
    look_back_s: _Seconds = 30.0  # window of autoscaling's averages
    cpus: _Cpus = 0.5
    gpus: Annotated[float, Field(ge=0)] = 0.0
    max_per_node: _Count | None = None


class RayConfig(_Part):
    address: str | None = None  # of a running Ray; None: Ray is started on this machine
    object_store_bytes: Bytes = Field(default=Bytes(100 << 20), alias="object_store_memory")


class ClusterConfig(_Part):
    name: str = "loraplex"  # Ray's application
    server: ServerConfig
    gateways: GatewaysConfig = GatewaysConfig()
    engines: EnginesConfig = EnginesConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.server.http.port == 0:
            raise ValueError("server.port is 0: Ray's proxies need a port that is the same for all")
        least = self.engines.min_replicas
        if least is not None and least > self.engines.replicas:
            raise ValueError("engines.min_replicas is above engines.replicas")
        if self.server.engine.quantization != "none":
            raise ValueError(
                "server.quantization: gateways check adapters against 16-bit weights; serve a "
                "quantised base with `loraplex serve`"
            )
        most = self.engines.max_replicas
        if most is not None and most < self.engines.replicas:
            raise ValueError("engines.max_replicas is below engines.replicas")
        return self


def read_config(path: Path | None) -> ClusterConfig:
    """Read the file, or return the defaults. Raises ConfigError, which repeats no secret."""
    parts = {} if path is None else read_yaml(path)
    options = parts.pop("server", None) or {}
    if not isinstance(options, Mapping):
        raise ConfigError("server: must hold a mapping of option names to values")
    flags = {str(name).replace("-", "_"): value for name, value in options.items()}
    try:
        return ClusterConfig(server=_with_catalogue(resolve_config(flags)), **parts)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {message}" if where else message) from None


def _with_catalogue(server: ServerConfig) -> ServerConfig:
    """Set the catalogue through which processes share adapters; by default it is a folder.

    A catalogue in a folder works for one machine, or for several that mount the folder.
    """
    store = server.store
    root = (store.root or loraplex_home() / "cluster").absolute()
    catalogue = store.catalogue
    if catalogue is None:
        (root / "catalogue").mkdir(parents=True, exist_ok=True)
        catalogue = (root / "catalogue").as_uri()
    store = store.model_copy(update={"root": root, "catalogue": catalogue})
    return server.model_copy(update={"store": store})
