"""PEFT's own mixed batch, `generate(adapter_names=…)`, behind the smallest possible server.

Static batches of up to 16: whoever comes while one runs waits for the next. PEFT has no server and
does not stream, so all tokens of an answer arrive with its last one.
"""

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loadtests.systems import BASE, System

_BATCH = 16
_NO_ADAPTER = "__base__"  # PEFT's own word for rows of the base


class PeftBatch(System):
    name = "peft"

    def missing(self) -> str | None:
        return None  # a dependency of ours

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        module = "loadtests.baselines.peft_batch"
        command = [sys.executable, "-m", module, str(model), str(port), dtype or "bfloat16"]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return [*command, *map(str, adapters)], {"PYTHONPATH": path}

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return {"model": name or BASE}


@dataclass
class _Job:
    prompt: str
    adapter: str
    max_tokens: int
    answer: str = ""
    n_tokens: int = 0
    ready: threading.Event = field(default_factory=threading.Event)


def serve(model: Path, port: int, dtype: str, adapters: Sequence[Path]) -> None:
    """Serve until interrupted. This thread generates; the server's threads wait for it."""
    jobs: queue.Queue[_Job] = queue.Queue()
    generate = _load(model, dtype, adapters)
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(jobs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        batch = [jobs.get()]
        while len(batch) < _BATCH and not jobs.empty():
            batch.append(jobs.get())
        generate(batch)


def _load(path: Path, dtype: str, adapters: Sequence[Path]) -> Callable[[list[_Job]], None]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    for index, adapter in enumerate(adapters):
        if index == 0:
            model = PeftModel.from_pretrained(model, adapter, adapter_name=adapter.name).eval()
        else:
            model.load_adapter(adapter, adapter_name=adapter.name)

    def generate(batch: list[_Job]) -> None:
        inputs = tokenizer([job.prompt for job in batch], return_tensors="pt", padding=True)
        names = {"adapter_names": [job.adapter for job in batch]} if adapters else {}
        n = max(job.max_tokens for job in batch)
        with torch.inference_mode():
            out = model.generate(
                **inputs, **names, max_new_tokens=n, min_new_tokens=n, do_sample=False
            )
        for job, row in zip(batch, out[:, inputs["input_ids"].shape[1] :], strict=True):
            ids = row[: job.max_tokens]
            job.answer, job.n_tokens = tokenizer.decode(ids), len(ids)
            job.ready.set()

    return generate


def _handler(jobs: queue.Queue[_Job]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # a name http.server looks for; /health
            self._send(200, b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body.get("prompt") or body["messages"][-1]["content"]
            name = _NO_ADAPTER if body["model"] == BASE else body["model"]
            job = _Job(prompt, name, int(body["max_tokens"]))
            jobs.put(job)
            job.ready.wait()
            choice = {"index": 0, "text": job.answer, "finish_reason": "length"}
            event = {"choices": [choice], "usage": {"completion_tokens": job.n_tokens}}
            data = json.dumps(event).encode()
            if body.get("stream"):
                data = b"data: " + data + b"\n\ndata: [DONE]\n\n"
            self._send(200, data)

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("dtype")
    parser.add_argument("adapters", type=Path, nargs="*")
    given = parser.parse_args()
    serve(given.model, given.port, given.dtype, given.adapters)
