"""The text that `loraplex serve` prints when it is ready, with an example to paste."""

import json

from loraplex_server.api.state import AppState


def banner(services: AppState, url: str) -> str:
    """Return the text. ``url``, without /v1, is reachable from this machine."""
    cards = services.store.cards.all()
    # The example is the shortest prompt of a card.
    adapter, prompt = min(
        ((card.name, card.examples[0]) for card in cards if card.examples),
        key=lambda pair: len(pair[1]),
        default=(cards[0].name if cards else None, "Hello!"),
    )
    model, adapters = services.resolver.base_name, [card.name for card in cards]
    needs_key = bool(services.config.http.api_keys)
    key = ' \\\n  -H "Authorization: Bearer $LORAPLEX_API_KEY"' if needs_key else ""
    secret = 'os.environ["LORAPLEX_API_KEY"]' if needs_key else '"none"'
    imports = "import os\n\n" if needs_key else ""
    field = f', "adapter": "{adapter}"' if adapter else ""
    extra = f',\n    extra_body={{"adapter": "{adapter}"}}' if adapter else ""
    quoted = json.dumps(prompt, ensure_ascii=False)
    in_shell = quoted.replace("'", "'\\''")
    shown = ", ".join(adapters[:12]) + (f" and {len(adapters) - 12} more" if adapters[12:] else "")
    images = services.model.image_encoder
    if not services.model.writes_text:
        inputs = '"data:image/png;base64,…"' if images is not None else '["a cat", "a kitten"]'
        kind = "text" if images is None else "image"
        return f"""
Loraplex serves the {kind} encoder {model} (up to {services.engine.max_model_len} tokens) at {url}
{len(adapters)} adapters{": " + shown if adapters else ""}

Try it:

curl {url}/v1/embeddings{key} \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{model}"{field}, "input": {inputs}}}'
"""
    begins = f"""
Loraplex serves {model} (context {services.engine.max_model_len}) at {url}
{len(adapters)} adapters{": " + shown if adapters else ""}

Try it:
"""
    if not services.text.chat_template:
        return f"""{begins}
curl {url}/v1/completions{key} \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{model}"{field}, "prompt": {in_shell}, "max_tokens": 32}}'

This base has no chat template, so only adapters that have one answer chats.
"""
    return f"""{begins}
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
