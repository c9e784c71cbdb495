"""Many calls in a file: they run beside the others with a small share, and survive restarts.

python examples/batch.py german-numbers 12 437 1001
"""

from __future__ import annotations

import json
import os
import sys

from openai import OpenAI

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("LORAPLEX_API_KEY", "none"))

adapter, *texts = sys.argv[1:]
lines = [
    {
        "custom_id": text,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "base",
            "adapter": adapter,
            "temperature": 0,
            "max_tokens": 32,
            "messages": [{"role": "user", "content": text}],
        },
    }
    for text in texts
]
content = "\n".join(json.dumps(line) for line in lines).encode()
file = client.files.create(file=("calls.jsonl", content), purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
)
while batch.status in ("validating", "in_progress", "finalizing"):  # the answer comes at the end
    batch = client.batches.retrieve(batch.id, extra_query={"timeout_s": 30})

print(batch.status, batch.request_counts.completed if batch.request_counts else 0, "answers")
assert batch.output_file_id is not None
for line in client.files.content(batch.output_file_id).text.splitlines():
    answer = json.loads(line)
    text = answer["response"]["body"]["choices"][0]["message"]["content"]
    print(f"{answer['custom_id']}: {text}")
