"""/openapi.json with the bounds that the models have.

FastAPI holds bounds as floats and would write 9.223372036854776e+18 for 2^63, which is more.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

__all__ = ["write_exact_bounds"]


def write_exact_bounds(app: FastAPI) -> None:
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _exact(made())
        schema = app.openapi_schema
        assert schema is not None
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of extending it


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
