"""Retrieval for several tenants of one server.

Each tenant has its own key, its own documents and its own adapter. All of them call it `support`: a
name means the tenant's own, and nobody sees the others'. The server's sentence encoder finds the
document, the tenant's adapter writes the answer.

    loraplex serve --keys keys.toml       # a key of scope "admin" for each tenant
    ACME_KEY=… UMBRA_KEY=… python examples/tenants_rag.py \\
        acme=path/to/adapter umbra=path/to/another "When do you open?"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
ENCODER = "all-minilm-l6-v2"
DOCUMENTS = {
    "acme": [
        "The shop opens at nine in the morning and closes at six.",
        "Parcels arrive within three days.",
        "Returns are free for a month.",
    ],
    "umbra": [
        "The museum opens at noon, and is closed on Mondays.",
        "A ticket costs twelve euros.",
        "Dogs are not allowed.",
    ],
}


class Tenant:
    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self._documents = DOCUMENTS[name]
        self._client = httpx.Client(
            base_url=URL, headers={"Authorization": f"Bearer {key}"}, timeout=600
        )
        self._vectors = self._embed(self._documents)

    def upload(self, folder: Path) -> str:
        """The digest of the tenant's `support`."""
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        answer = self._client.put("/v1/adapters/support", files=files)
        answer.raise_for_status()
        return str(answer.json()["digest"])

    def find(self, question: str) -> str:
        """The document whose meaning is nearest; vectors have length 1."""
        (asked,) = self._embed([question])
        likeness = [sum(a * b for a, b in zip(asked, v, strict=True)) for v in self._vectors]
        return self._documents[likeness.index(max(likeness))]

    def ask(self, question: str) -> str:
        prompt = f"{self.find(question)}\n\nQuestion: {question}"
        body = {
            "adapter": "support",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 48,
        }
        answer = self._client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    def names(self) -> list[str]:
        """What the tenant can see."""
        listed = self._client.get("/v1/adapters")
        listed.raise_for_status()
        return [card["name"] for card in listed.json()["data"]]

    def _embed(self, texts: list[str]) -> list[list[float]]:
        answer = self._client.post("/v1/embeddings", json={"model": ENCODER, "input": texts})
        answer.raise_for_status()
        return [row["embedding"] for row in answer.json()["data"]]


*folders, question = sys.argv[1:]
for name, _, folder in (item.partition("=") for item in folders):
    tenant = Tenant(name, os.environ[f"{name.upper()}_KEY"])
    digest = tenant.upload(Path(folder))
    print(f"{name}: adapters {', '.join(tenant.names())}; support is {digest[:12]}")
    print(f"  found:  {tenant.find(question)}")
    print(f"  answer: {tenant.ask(question)}")
