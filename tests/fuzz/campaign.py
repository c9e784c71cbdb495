"""Sends case after case to a real server and watches the answer of a bystander."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.architectures import tiny_model
from tests.support.lora_files import write_lora
from tests.support.server_process import save_tiny_model, server_process

from .cases import Case, make_case
from .judge import Judge

__all__ = ["Finding", "Target", "fuzz_target"]

CANARY = "canary-of-the-fuzz"  # in no list of names: nobody else asks for it
_LOOK_AFTER = 100  # cases between two looks at the canary
_TIMEOUT_S = 120.0
_CHAT = {"messages": [{"role": "user", "content": "tell me"}], "max_tokens": 8}


@dataclass(frozen=True)
class Finding:
    seed: int
    number: int
    what: str
    case: Case
    answer: str

    def __str__(self) -> str:
        return (
            f"{self.what}\n  again: python -m tests.fuzz --seed {self.seed} --first {self.number} "
            f"--cases 1\n{self.case}\n-> {self.answer}"
        )


class Target:
    def __init__(self, client: httpx.Client, judge: Judge, is_alive: Callable[[], bool]) -> None:
        self.client = client
        self._judge = judge
        self.is_alive = is_alive
        self._schema: dict[str, Any] = client.get("/openapi.json").json()
        self._canary = self._ask_canary()
        self.statuses: Counter[int] = Counter()
        self.slowest_s = 0.0

    def run(self, seed: int, numbers: Sequence[int], *, max_findings: int = 10) -> list[Finding]:
        findings: list[Finding] = []
        for count, number in enumerate(numbers, 1):
            case = make_case(self._schema, seed, number)
            for what, answer in self._problems(case):
                findings.append(Finding(seed, number, what, case, answer))
            if (count % _LOOK_AFTER == 0 or count == len(numbers)) and not findings:
                now = self._ask_canary()
                if now != self._canary:
                    what = f"the canary's answer changed since case {number - _LOOK_AFTER}"
                    findings.append(Finding(seed, number, what, case, f"{self._canary} -> {now}"))
            if len(findings) >= max_findings or not self.is_alive():
                break
        return findings

    def _problems(self, case: Case) -> Iterator[tuple[str, str]]:
        answer = None
        for sent in (case, *_uses(case)):
            if sent is not case and (answer is None or answer.status_code not in (200, 201)):
                return
            began = time.monotonic()
            try:
                answer = self._send(sent)
            except httpx.HTTPError as error:
                yield f"no answer: {error!r}", f"alive: {self.is_alive()}"
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.statuses[answer.status_code] += 1
            what = self._judge.problem(sent, answer)
            if what is not None:
                yield what, f"{sent.path} {answer.status_code} {answer.text[:1500]}"

    def _send(self, case: Case) -> httpx.Response:
        # as a latin-1 string where it is none of ASCII: clients do send such headers
        headers = [(k.encode(), v.encode("utf-8")) for k, v in case.headers.items()]
        url = self.client.base_url.copy_with(raw_path=case.path.encode())
        return self.client.request(case.method, url, headers=headers, content=case.content)

    def _ask_canary(self) -> Any:
        body = {**_CHAT, "adapter": CANARY, "temperature": 0, "logprobs": True}
        for _ in range(50):  # a flood of its own making may fill the adapters' memory
            answer = self.client.post("/v1/chat/completions", json=body)
            if answer.status_code != 503:
                break
            time.sleep(float(answer.headers["retry-after"]))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]


def _uses(case: Case) -> Iterator[Case]:
    """Requests that use an adapter which was just taken."""
    if case.adapter is None:
        return
    for sampling in (b'"temperature":0', b'"top_p":0.9,"seed":1,"logprobs":true'):
        body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":3,"adapter":"%s",%s}' % (
            case.adapter.encode(),
            sampling,
        )
        headers = {"content-type": "application/json"}
        yield Case("POST", "/v1/chat/completions", headers, body)


@contextmanager
def fuzz_target(folder: Path) -> Iterator[Target]:
    adapter = write_lora(folder / "adapters" / "kept", BaseSpec.of(tiny_model(), "tiny/llama"))
    model = save_tiny_model(folder / "model", context=128)
    flags = ("--adapters-dir", adapter.parent, "--max-choices", "8")
    with server_process(model, folder / "state", *flags) as server:
        secrets = [str(folder), str(Path.home()) + "/", str(Path(__file__).parents[2])]
        with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S) as client:
            # the same content under two names: what happens to one must not touch the other
            put = client.put(f"/v1/adapters/{CANARY}", json={"source": "kept"})
            assert put.status_code == 201, put.text
            yield Target(client, Judge(secrets), lambda: server.process.poll() is None)
