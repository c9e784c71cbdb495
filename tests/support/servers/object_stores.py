"""An S3 server (moto), and the settings with which a catalogue finds it."""

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraplex_adapter_store.catalogue.bucket import Bucket

MIDDLE_OF_NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port

S3_SECRET = "the-secret-of-the-bucket"


@contextmanager
def s3_server(bucket: str = "adapters") -> Iterator[str]:
    """Yield the endpoint of a server with an empty bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        made = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
        with urllib.request.urlopen(made):
            yield endpoint
    finally:
        server.stop()


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
