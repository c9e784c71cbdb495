"""What `loraplex serve` prints when it is ready: something to paste and see work."""

from __future__ import annotations

import json
from collections.abc import Sequence

__all__ = ["banner"]


def banner(
    url: str,
    model: str,
    adapters: Sequence[str],
    adapter: str | None,
    prompt: str,
    *,
    needs_key: bool,
    model_note: str,
) -> str:
    """``url`` without /v1; ``adapter`` and ``prompt`` are those of the example."""
    key = ' \\\n  -H "Authorization: Bearer $LORAPLEX_API_KEY"' if needs_key else ""
    secret = 'os.environ["LORAPLEX_API_KEY"]' if needs_key else '"none"'
    imports = "import os\n\n" if needs_key else ""
    field = f', "adapter": "{adapter}"' if adapter else ""
    extra = f',\n    extra_body={{"adapter": "{adapter}"}}' if adapter else ""
    quoted = json.dumps(prompt, ensure_ascii=False)
    in_shell = quoted.replace("'", "'\\''")
    shown = ", ".join(adapters[:12]) + (f" and {len(adapters) - 12} more" if adapters[12:] else "")
    return f"""
Loraplex serves {model} ({model_note}) at {url}
{len(adapters)} adapters{": " + shown if adapters else ""}

Try it:

curl {url}/v1/chat/completions{key} \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{model}"{field}, "messages": [{{"role": "user", "content": {in_shell}}}]}}'

or in Python (pip install openai):

{imports}from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key={secret})
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": {quoted}}}]{extra},
)
print(answer.choices[0].message.content)
"""
