"""The packages as libraries: docstrings, read by mkdocstrings."""

from __future__ import annotations

__all__ = ["python_api_page"]

_HEAD = """# Python API

The packages below the server work without it. What is listed is public; the rest may change.
Client code needs none of it: OpenAI's client will do ([Start](../index.md)).
"""
_MODULES = {
    "Reading adapters": (
        "loraplex_adapter_store.fold.reader",
        "loraplex_adapter_store.plan",
        "loraplex_adapter_store.limits",
        "loraplex_adapter_store.errors",
    ),
    "The store": ("loraplex_adapter_store.store", "loraplex_adapter_store.names.put_options"),
    "Routing": ("loraplex_router.replicas.policy",),
    "Kernels": ("loraplex_kernels.reference.lora",),
    "The server": ("loraplex_server.launch", "loraplex_server.api.app"),
}


def python_api_page() -> str:
    lines = [_HEAD]
    for heading, modules in _MODULES.items():
        lines += [f"## {heading}", ""]
        for module in modules:
            lines += [f"::: {module}", ""]
    return "\n".join(lines)
