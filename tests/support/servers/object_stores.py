"""An S3 server (moto), and the settings with which a catalogue finds it."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from werkzeug.serving import make_server

from loraplex_adapter_store.catalogue.bucket import Bucket

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

MIDDLE_OF_NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port

S3_SECRET = "the-secret-of-the-bucket"


@contextmanager
def s3_server(bucket: str = "adapters") -> Iterator[str]:
    """Yield the endpoint of a server with an empty bucket.

    The server answers one request at a time. With several threads, moto looks for the key of
    ``If-None-Match: *`` and writes it later, so two writers could create the same object.
    """
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    one_request = threading.Lock()

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        with one_request:
            return list(moto(environ, start_response))

    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        made = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
        with urllib.request.urlopen(made):
            yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "the-key-of-the-bucket",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


class Switch:
    """A bucket in a directory whose requests fail while it is switched off."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in s3_environment(MIDDLE_OF_NOWHERE).items():
            monkeypatch.setenv(name, value)
        self._on = Bucket.open(f"file://{folder}", "x")
        self._off = Bucket.open("s3://adapters", "x")
        self.bucket = Bucket(self._on._files, self._on._small)

    def turn(self, *, on: bool) -> None:
        source = self._on if on else self._off
        self.bucket._files, self.bucket._small = source._files, source._small
