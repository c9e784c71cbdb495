"""Measures the cost of the HTTP front. Run: python loadtests/parts/bench_front.py

- CPU microseconds per streamed token, 16 clients over real sockets, the engine scripted;
- milliseconds of one /metrics page with 1,000 registered adapters.

Prints one line of JSON.
"""

import asyncio
import json
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import uvicorn
from prometheus_client import generate_latest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

N_CLIENTS, N_TOKENS, STEP_S = 16, 64, 0.01
N_ADAPTERS, N_PAGES = 1000, 50
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"prompt": "hi"}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec = BaseSpec.of(tiny_model(), "tiny")
        front = make_front(tiny_tokenizer(), spec, Path(folder))
        front.engine.max_queue, front.engine.manual = 1000, True
        front.engine.answer = "the server keeps one base model and many adapters " * 20
        result = {
            "machine": platform.processor() or platform.machine(),
            "chat_us_per_token": await us_per_token(front, "/v1/chat/completions", CHAT),
            "completions_us_per_token": await us_per_token(front, "/v1/completions", COMPLETION),
            **metrics_ms(front, spec),
        }
        front.store.close()
    print(json.dumps(result))


async def us_per_token(front: Front, path: str, body: dict[str, object]) -> float:
    """Return the CPU time of this process; the clients run in another process."""
    options = {"stream": True, "max_tokens": N_TOKENS, "ignore_eos": True}
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(front.app, lifespan="off", access_log=False, log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        front.engine.requests.clear()
        clients = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "clients", str(listening.getsockname()[1]), path),
            json.dumps({**body, **options}),
        )
        await front.engine.arrival(N_CLIENTS)
        before = time.process_time()
        for _ in range(N_TOKENS):
            front.engine.step()
            await asyncio.sleep(STEP_S)
        spent = time.process_time() - before
        await clients.wait()
        server.should_exit = True
        await serving
    return round(spent / (N_CLIENTS * N_TOKENS) * 1e6, 1)


def metrics_ms(front: Front, spec: BaseSpec) -> dict[str, object]:
    services = front.app.state.parts
    source = write_lora(front.root / "a", spec)
    for number in range(N_ADAPTERS):
        front.store.put_directory(f"a{number}", source)
        services.metrics.usage.counters(f"a{number}").n_requests += 1
    listing, pages = [], []
    for _ in range(N_PAGES):
        services.collector._listed_at = float("-inf")
        begin = time.perf_counter()
        services.collector.refresh_listing()
        listed = time.perf_counter()
        page = generate_latest(services.registry)
        pages.append(time.perf_counter() - listed)
        listing.append(listed - begin)
    return {
        "metrics_page_ms": round(median(pages) * 1000, 2),
        "metrics_listing_ms_off_loop": round(median(listing) * 1000, 2),
        "metrics_lines": page.count(b"\n"),
        "n_adapters": N_ADAPTERS,
    }


async def clients(port: int, path: str, body: str) -> None:
    head = (
        "POST {} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        "content-type: application/json\r\ncontent-length: {}\r\n\r\n"
    )

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.format(path, len(body)).encode() + body.encode())
        while await reader.read(1 << 16):
            pass
        writer.close()

    await asyncio.gather(*(one() for _ in range(N_CLIENTS)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["clients"]:
        asyncio.run(clients(int(sys.argv[2]), *sys.argv[3:]))
    else:
        asyncio.run(main())
