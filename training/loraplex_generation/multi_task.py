"""The multi-task adapter: one LoRA that follows a task's description in the system turn.

It was trained on the tasks that ``adapter.json`` names, with the description as the system turn and
up to eight answered examples as turns. So it answers from a sentence alone, and it is a start for
learning from examples.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from .errors import GeneratorMismatch, NotTrained, UnfitPrompts
from .generated import GeneratedAdapter
from .request import AdapterGenerationRequest

METHOD = "multi-task"
MOST_TURNS = 8  # answered examples of a chat in its training
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CARD = "adapter.json"  # the base's fingerprint, the data and their licences


@dataclass(frozen=True, slots=True)
class MultiTaskAdapter:
    """The adapter's folder, checked for the base. Thread-safe."""

    folder: Path
    base_name: str
    base: str  # fingerprint of the base that it was trained for

    @classmethod
    def load(cls, folder: Path, *, base_name: str, base_directory: Path) -> "MultiTaskAdapter":
        """Raises NotTrained without the files, GeneratorMismatch for another base's."""
        if not (folder / _CARD).is_file():
            raise NotTrained(f"{folder} holds no {_CARD} of a multi-task adapter")
        wanted = str(json.loads((folder / _CARD).read_text())["base"])
        served = base_fingerprint(base_directory)
        if served != wanted:
            raise GeneratorMismatch(
                f"the multi-task adapter is of base {wanted}, not {served}; a description "
                "without examples is answered by the base itself, with the description as the "
                "system prompt"
            )
        return cls(folder, base_name, wanted)

    def generate(self, request: AdapterGenerationRequest) -> GeneratedAdapter:
        """Return the adapter with the description as its system prompt.

        Raises UnfitPrompts, and NotTrained for another method.
        """
        if request.prompts:
            raise UnfitPrompts(f'method "{request.method}" has no use for prompts; "icm-lora" has')
        if request.method not in ("auto", METHOD):
            raise NotTrained(f"there is no method {request.method!r}; there are auto, {METHOD}")
        config = json.loads((self.folder / _CONFIG).read_text())
        config["base_model_name_or_path"] = self.base_name
        tensors = {name: t.float() for name, t in load_file(self.folder / _WEIGHTS).items()}
        card: dict[str, object] = {
            "description": request.description,
            "method": METHOD,
            "asked_method": request.method,
            "base": self.base,
        }
        return GeneratedAdapter(config, tensors, card, request.description, METHOD)


def base_fingerprint(directory: Path) -> str:
    """Return an identity of the weights: a hash of the file's size, header and some bytes."""
    path = directory / "model.safetensors"
    if not path.is_file():
        return "a base of several files"
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(path.stat().st_size // 2)
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
