"""Catalogues in a directory and on an S3 server, and stores that share one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.store import AdapterStore
from tests.support.servers.object_stores import s3_environment, s3_server

OpenStore = Callable[..., AdapterStore]

ALWAYS_ASK = CatalogueLimits(refresh_s=0.0, poll_s=3600.0)  # no answer from memory, no thread


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty catalogue."""
    if request.param == "file":
        return f"file://{tmp_path}/catalogue"
    for name, value in s3_environment(request.getfixturevalue("s3_endpoint")).items():
        monkeypatch.setenv(name, value)
    return f"s3://adapters/{tmp_path.name}"


@pytest.fixture
def catalogue(url: str, base: BaseSpec) -> Catalogue:
    return Catalogue.open(url, base)


@pytest.fixture
def open_store(tmp_path: Path, catalogue: Catalogue, base: BaseSpec) -> Iterator[OpenStore]:
    """open_store("a") → a server's store with a disk of its own; the catalogue is shared."""
    with ExitStack() as stores:

        def opened(
            server: str, *, limits: CatalogueLimits = ALWAYS_ASK, n_kept: int = 0, **more: object
        ) -> AdapterStore:
            return stores.enter_context(
                AdapterStore(
                    tmp_path / "servers" / server,
                    base,
                    catalogue=catalogue,
                    catalogue_limits=limits,
                    n_kept_revisions=n_kept,
                    **more,  # type: ignore[arg-type]
                )
            )

        yield opened
