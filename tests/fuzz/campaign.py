"""Sends case after case to a real server and watches the answer of a bystander."""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import httpx

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import save_tiny_model, server_process

from .cases import Case, make_case
from .judge import Judge

CANARY = "canary-of-the-fuzz"  # in no list of names: nobody else asks for it
KNOWN = "known-to-the-fuzz"
_LOOK_AFTER = 100  # cases between two looks at the canary
_TIMEOUT_S = 120.0
_PROMPT = {"prompt": "x", "max_tokens": 1}
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
        self._known = self._make_known()
        self.statuses: Counter[int] = Counter()
        self.routes: set[tuple[str, str]] = set()  # methods and paths that cases were made of
        self.slowest_s = 0.0

    def run(self, seed: int, numbers: Sequence[int], *, max_findings: int = 10) -> list[Finding]:
        findings: list[Finding] = []
        for count, number in enumerate(numbers, 1):
            case = make_case(self._schema, seed, number)
            self.routes |= {case.route} if case.route else set()
            for what, answer in self._problems(case):
                findings.append(Finding(seed, number, what, case, answer))
            if (count % _LOOK_AFTER == 0 or count == len(numbers)) and not findings:
                self._known = self._make_known()
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
        if case.endpoint is not None and answer is not None and answer.status_code == 200:
            yield from self._problems_of_batch(case, answer.json()["id"])

    def _problems_of_batch(self, case: Case, file_id: str) -> Iterator[tuple[str, str]]:
        """Run the calls of a file that was taken."""
        order = {"input_file_id": file_id, "endpoint": case.endpoint, "completion_window": "24h"}
        made = self.client.post("/v1/batches", json=order)
        if made.status_code != 200:  # lines of several endpoints
            what = self._judge.problem(case, made)
            yield from [] if what is None else [(what, made.text)]
            return
        ended = self.client.get(f"/v1/batches/{made.json()['id']}?timeout_s=60").json()
        if ended["status"] not in ("completed", "failed"):
            yield "the batch does not end", str(ended)
        for id in filter(None, (file_id, ended["output_file_id"], ended["error_file_id"])):
            if id != file_id:
                for line in self.client.get(f"/v1/files/{id}/content").text.splitlines():
                    told = json.loads(line)["response"]
                    answer = httpx.Response(
                        told["status_code"], json=told["body"], headers={"retry-after": "1"}
                    )
                    if (what := self._judge.problem(case, answer)) is not None:
                        yield f"{what} in a batch", line[:1500]
            self.client.delete(f"/v1/files/{id}")

    def _send(self, case: Case) -> httpx.Response:
        if case.wire is not None:
            return self._send_bytes(case)
        # as a latin-1 string where it is none of ASCII: clients do send such headers
        headers = [(k.encode(), v.encode("utf-8")) for k, v in case.headers.items()]
        path = case.path
        for name, id in self._known.items():
            path = path.replace(f"{{{name}}}", id)
        url = self.client.base_url.copy_with(raw_path=path.encode())
        return self.client.request(case.method, url, headers=headers, content=case.content)

    def _make_known(self) -> dict[str, str]:
        """Make something for each kind of id in a path."""
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": _PROMPT}
        form = {"files": {"file": ("a", json.dumps(line))}, "data": {"purpose": "batch"}}
        file = self.client.post("/v1/files", **form).json()["id"]
        order = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file}
        job = self.client.put(f"/v1/adapters/{KNOWN}", json={"source": "kept", "wait": False})
        answer = {"input": "x", "max_output_tokens": 1}
        return {
            "file_id": file,
            "batch_id": self.client.post("/v1/batches", json=order).json()["id"],
            "job_id": job.json()["id"],
            "response_id": self.client.post("/v1/responses", json=answer).json()["id"],
            "model_id": KNOWN,
        }

    def _send_bytes(self, case: Case) -> httpx.Response:
        url = self.client.base_url
        with socket.create_connection((url.host, url.port or 80), timeout=_TIMEOUT_S) as sent:
            sent.sendall(case.to_wire(url.netloc))
            answer = HTTPResponse(sent, method=case.method)
            try:
                answer.begin()
                content = answer.read()
            except (OSError, HTTPException) as error:
                raise httpx.TransportError(repr(error)) from error
            return httpx.Response(answer.status, headers=answer.getheaders(), content=content)

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
