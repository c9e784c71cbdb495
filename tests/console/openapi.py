"""Prints the schema of the HTTP API; the console's types are made of it.

python -m tests.console.openapi > build/openapi.json
"""

import json
import tempfile
from pathlib import Path

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import make_front
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec = BaseSpec.of(tiny_model(), "tiny/llama")
        front = make_front(tiny_tokenizer(), spec, Path(folder))
        print(json.dumps(front.app.openapi(), indent=1, sort_keys=True))
        front.close()


if __name__ == "__main__":
    main()
