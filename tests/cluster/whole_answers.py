"""Chats that are answered whole, for comparing servers."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.cluster.conftest import ADMIN


def body_of(adapter: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "adapter": adapter,
        "messages": [{"role": "user", "content": f"the server keeps {adapter or 'one base'}"}],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        **changes,
    }


def answers(url: str, bodies: list[dict[str, Any]], *, n_at_once: int = 8) -> list[Any]:
    """Choices, usage and adapter of each, in order; what differs from call to call is left out."""

    def ask(body: dict[str, Any]) -> Any:
        answer = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
        return answer["choices"], answer["usage"], answer.get("adapter")

    with httpx.Client(timeout=600, headers=ADMIN) as client, ThreadPoolExecutor(n_at_once) as pool:
        return list(pool.map(ask, bodies))
