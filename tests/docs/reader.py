"""Makes the files that pages assume in their reader's folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

from research.few_shot.drawings import write_folder
from research.few_shot.drawn_clip import save_drawn_clip

_DEMOS = Path(str(files("loraplex_adapter_store"))) / "demos"


class Reader:
    """``folder``: where the commands run; ``served``: an --adapters-dir of the server."""

    def __init__(self, folder: Path, served: Path, base: Path) -> None:
        self.folder = folder
        self.served = served
        self.base = base

    def two_adapters(self) -> None:
        """Write an adapter to the reader's folder, and another to the server's."""
        shutil.copytree(_DEMOS / "german-numbers", self.folder, dirs_exist_ok=True)
        shutil.copytree(_DEMOS / "pirate", self.served / "mine")

    def classifier(self) -> None:
        """Write a classifier of two classes with random weights, and its labels."""
        hidden = json.loads((self.base / "config.json").read_text())["hidden_size"]
        torch.manual_seed(0)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": torch.randn(4, hidden) / hidden**0.5,
            f"{module}.lora_B.weight": torch.randn(hidden, 4) / 2,
            "base_model.model.score.weight": torch.randn(2, hidden) / hidden**0.5,
        }
        save_file(tensors, self.folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
            "modules_to_save": ["score"],
        }
        (self.folder / "adapter_config.json").write_text(json.dumps(config))
        labels = {"id2label": {"0": "bad", "1": "good"}}
        (self.folder / "config.json").write_text(json.dumps(labels))

    def pets(self) -> None:
        """Write a small CLIP that was not trained, and drawings in the folders of two pets."""
        save_drawn_clip(self.folder / "clip", steps=0)
        pets = {"tabby cat": ["red ring"], "beagle": ["blue bar"]}
        write_folder(self.folder / "pets", pets, 4, seed=0)
        write_folder(self.folder / "other-pets", pets, 4, seed=1)

    def chats(self, name: str) -> None:
        lines = (
            {
                "messages": [
                    {"role": "user", "content": f"{number} in German?"},
                    {"role": "assistant", "content": text},
                ]
            }
            for number, text in enumerate(["null", "eins", "zwei", "drei"] * 6)
        )
        (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


GIVEN: Mapping[str, Callable[[Reader], None]] = {
    "docs/http-api.md": Reader.two_adapters,
    "docs/adapters-over-http.md": Reader.two_adapters,
    "docs/embeddings.md": Reader.classifier,
    "docs/training.md": lambda reader: reader.chats("numbers.jsonl"),
    "docs/recipes.md": lambda reader: reader.chats("numbers.jsonl"),
    "docs/image-classes.md": Reader.pets,
    "docs/routed-adapters.md": lambda reader: reader.chats("data.jsonl"),
}
