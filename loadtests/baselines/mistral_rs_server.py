"""Serves mistral.rs's Python `Runner` over HTTP, for load tests; runs in the venv of mistralrs.

python mistral_rs_server.py FILE.gguf PORT [ADAPTER_FOLDER]...
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mistralrs

_MAX_REQUESTS = 16


def main() -> None:
    file, port, *folders = sys.argv[1:]
    path = Path(file)
    adapters = [mistralrs.LoraAdapter(Path(folder).name, folder) for folder in folders]
    limits = {"adapters": adapters, "max_adapters": len(adapters)} if adapters else {}
    runner = mistralrs.Runner(
        mistralrs.Which.GGUF(str(path.parent), path.name, **limits),
        max_seqs=_MAX_REQUESTS,
        prefix_cache_n=0,
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            n_tokens = 0
            for chunk in runner.send_chat_completion_request(_request(body)):
                choice = chunk.choices[0]
                n_tokens += 1
                text = choice.delta.content or ""
                self._send(
                    {
                        "choices": [
                            {"delta": {"content": text}, "finish_reason": choice.finish_reason}
                        ]
                    }
                )
            self._send({"choices": [], "usage": {"completion_tokens": n_tokens}})
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _send(self, event: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


def _request(body: dict[str, Any]) -> Any:
    return mistralrs.ChatCompletionRequest(
        messages=body["messages"],
        model="default",
        max_tokens=body.get("max_tokens"),
        temperature=body.get("temperature"),
        ignore_eos=bool(body.get("ignore_eos")),
        stream=True,
        adapter=body.get("adapter"),
    )


if __name__ == "__main__":
    main()
