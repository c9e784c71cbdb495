"""Times a long conversation after a restart, with `--prefix-cache-dir` and without.

    python -m loadtests.parts.bench_restart [--n-tokens 4000] [--rounds 3]

The default base. Each round starts a server with the files of the round before, while four streams
decode: seconds to the first token, and the longest gap of the streams meanwhile.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.client import StreamingClient
from loadtests.neighbours.interference import Streams
from loadtests.provenance import stamped
from loadtests.systems import BASE, Loraplex, started
from loraplex_server.model.loading.pull import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n-tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    body = _body(options.n_tokens)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        work = Path(folder)
        with_files = {"prefix-cache-dir": work / "files"}
        first = _turn(with_files, body, work)
        runs: dict[str, list[Mapping[str, Any]]] = {"with files": [], "without": []}
        for _ in range(options.rounds):
            runs["with files"].append(_turn(with_files, body, work))
            runs["without"].append(_turn({}, body, work))
        n_bytes = sum(path.stat().st_size for path in work.glob("files/*/*.kv"))
    shown: dict[str, Any] = {"before the restart": first, "MiB of files": n_bytes >> 20}
    for name, found in runs.items():
        shown[name] = {key: round(median(run[key] for run in found), 3) for key in first}
    print(json.dumps(stamped(shown), indent=1))


def _turn(settings: Mapping[str, object], body: Mapping[str, Any], work: Path) -> dict[str, float]:
    """Start a server, ask once beside four streams, and stop the server."""
    with started(Loraplex(settings), resolve_model(), [], work) as target:
        client = StreamingClient(target.url)
        streams = Streams(target.url, BASE, 400)
        try:
            client.stream({**body, "messages": body["messages"][:1]})  # the streams decode by now
            outcome = client.stream(body)
        finally:
            streams.stop()
        if outcome.error or outcome.ttft_s is None:
            raise RuntimeError(outcome.error)
    start, end = outcome.sent_at, outcome.sent_at + outcome.ttft_s
    gaps = [gap for at, gap in streams.gaps() if start <= at + gap and at <= end]
    return {
        "first token, seconds": round(outcome.ttft_s, 3),
        "cached tokens": outcome.n_cached,
        "longest gap beside it, seconds": round(max(gaps, default=0.0), 3),
    }


def _body(n_tokens: int) -> dict[str, Any]:
    """Return a conversation of about ``n_tokens`` tokens and a question."""
    turns = n_tokens // 40
    messages = [
        {
            "role": "assistant" if number % 2 else "user",
            "content": f"Note {number}: ship {number * 7} left the harbour of Lisbon at noon "
            "with wool, salt and a letter for the keeper of the lighthouse.",
        }
        for number in range(turns - turns % 2)
    ]
    messages.append({"role": "user", "content": "Which ship left first?"})
    return {
        "model": BASE,
        "messages": messages,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


if __name__ == "__main__":
    main()
