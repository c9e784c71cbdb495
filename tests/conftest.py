"""Fixtures that every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex_server.model.pull import DEFAULT_BASE, DEFAULT_ENCODER, pull


@pytest.fixture(scope="session")
def pulled_base() -> Path:
    """The directory of the default base model; pulled once, then instant."""
    return pull(DEFAULT_BASE)


@pytest.fixture(scope="session")
def pulled_encoder() -> Path:
    """The directory of the sentence encoder; pulled once, then instant."""
    return pull(DEFAULT_ENCODER)
