"""PEFT's own mixed batch, `generate(adapter_names=…)`, behind the smallest possible server.

Static batches of up to 16: whoever comes while one runs waits for the next. PEFT has no server and
does not stream, so all tokens of an answer arrive with its last one.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .systems import System

__all__ = ["PeftBatch", "serve"]

_BATCH = 16
_BASE = "__base__"  # PEFT's own word for rows without an adapter


class PeftBatch(System):
    name = "peft"

    def missing(self) -> str | None:
        return None  # a dependency of ours

    def command(
        self, model: Path, adapters: Sequence[Path], dtype: str, port: int
    ) -> tuple[list[str], Mapping[str, str]]:
        here = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-m", "loadtests.peers.peft_batch", str(model), str(port), dtype]
        return [*command, *map(str, adapters)], {"PYTHONPATH": str(here)}

    def body(self, adapter: int | None) -> dict[str, Any]:
        return {"model": "base" if adapter is None else f"a{adapter}"}


@dataclass
class _Wish:
    prompt: str
    adapter: str
    max_tokens: int
    answer: str = ""
    n_tokens: int = 0
    ready: threading.Event = field(default_factory=threading.Event)


def serve(model: Path, port: int, dtype: str, adapters: Sequence[Path]) -> None:
    """Blocks. One thread generates; the others wait for it."""
    wishes: queue.Queue[_Wish] = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(wishes))
    threading.Thread(target=_generate, args=(wishes, model, dtype, adapters), daemon=True).start()
    server.serve_forever()


def _generate(wishes: queue.Queue[_Wish], path: Path, dtype: str, adapters: Sequence[Path]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    for index, adapter in enumerate(adapters):
        if index == 0:
            model = PeftModel.from_pretrained(model, adapter, adapter_name="a0").eval()
        else:
            model.load_adapter(adapter, adapter_name=f"a{index}")
    while True:
        batch = [wishes.get()]
        while len(batch) < _BATCH and not wishes.empty():
            batch.append(wishes.get())
        inputs = tokenizer([wish.prompt for wish in batch], return_tensors="pt", padding=True)
        names = {"adapter_names": [wish.adapter for wish in batch]} if adapters else {}
        n = max(wish.max_tokens for wish in batch)
        with torch.inference_mode():
            out = model.generate(
                **inputs, **names, max_new_tokens=n, min_new_tokens=n, do_sample=False
            )
        for wish, row in zip(batch, out[:, inputs["input_ids"].shape[1] :], strict=True):
            ids = row[: wish.max_tokens]
            wish.answer, wish.n_tokens = tokenizer.decode(ids), len(ids)
            wish.ready.set()


def _handler(wishes: queue.Queue[_Wish]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # the name http.server looks for
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body.get("prompt") or body["messages"][-1]["content"]
            name = _BASE if body["model"] == "base" else body["model"]
            wish = _Wish(prompt, name, int(body["max_tokens"]))
            wishes.put(wish)
            wish.ready.wait()
            choice = {"index": 0, "text": wish.answer, "finish_reason": "length"}
            event = {"choices": [choice], "usage": {"completion_tokens": wish.n_tokens}}
            data = json.dumps(event).encode()
            if body.get("stream"):
                data = b"data: " + data + b"\n\ndata: [DONE]\n\n"
            self.send_response(200)
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
