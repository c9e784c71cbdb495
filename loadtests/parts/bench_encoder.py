"""Embeddings per second of an encoder: without adapters, with many, and beside PEFT.

    loraplex serve --model all-minilm-l6-v2 --max-loras 32 &
    python loadtests/parts/bench_encoder.py --base ~/.cache/loraplex/models/all-minilm-l6-v2

Calls of ``--texts`` texts each name one of ``--adapters`` LoRAs of rank 8 on queries and values.
The server answers ``--clients`` calls at a time. sentence-transformers answers the same calls one
by one: it holds all adapters and activates that of the call. The three take turns, and the ratios
are those of the median turns. With ``--images`` a call has images of 320 x 240 pixels, and PEFT
runs on transformers' own model and image processor.
"""

import argparse
import base64
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoImageProcessor, AutoModel

_TARGETS = {
    "modernbert": ["Wqkv"],
    "distilbert": ["q_lin", "v_lin"],
    **{name: ["q_proj", "v_proj"] for name in ("vit", "dinov2", "clip", "siglip")},
}
_WORDS = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split()
Call = tuple[str, list[str]]  # adapter, texts or data: URLs of images
Embed = Callable[[list[str]], object]  # the texts or images of a call, with the active adapter


def make_adapters(base: Path, folder: Path, n: int) -> list[str]:
    """Save ``n`` LoRAs of random weights below ``folder``; return their names."""
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    targets = _TARGETS.get(model_type, ["query", "value"])
    names = []
    for index in range(n):
        torch.manual_seed(index)
        config = LoraConfig(r=8, target_modules=targets, task_type="FEATURE_EXTRACTION")
        tuned = get_peft_model(AutoModel.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        names.append(f"throughput-{index}")
        tuned.save_pretrained(folder / names[-1])
    return names


def mean_of(base: Path) -> SentenceTransformer:
    """Return the normalised mean of hidden states, as the server computes it without files."""
    transformer = Transformer(str(base))
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    modules = [transformer, Pooling(width, pooling_mode="mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


def make_calls(names: Sequence[str], n_calls: int, n_inputs: int, *, images: bool) -> list[Call]:
    rng = random.Random(1)

    def text() -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(4, 40)))

    def image() -> str:
        file = io.BytesIO()
        Image.frombytes("RGB", (8, 6), rng.randbytes(144)).resize((320, 240)).save(file, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    make = image if images else text
    return [(names[i % len(names)], [make() for _ in range(n_inputs)]) for i in range(n_calls)]


def image_embedder(base: Path) -> tuple[torch.nn.Module, Embed]:
    """Return transformers' model, and its embeddings of ``data:`` URLs."""
    model = AutoModel.from_pretrained(base).eval()
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")

    @torch.inference_mode()
    def embed(urls: list[str]) -> object:
        files = [base64.b64decode(url.partition(",")[2]) for url in urls]
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=pixels)
        return model(pixel_values=pixels)

    return model, embed


def text_embedder(base: Path) -> tuple[torch.nn.Module, Embed]:
    """Return the model of sentence-transformers, and its embeddings of texts."""
    reference = mean_of(base)

    def embed(texts: list[str]) -> object:
        return reference.encode(texts, show_progress_bar=False)

    return reference[0].auto_model, embed


def seconds_of_server(client: httpx.Client, calls: Sequence[Call], n: int, *, plain: bool) -> float:
    def ask(call: Call) -> None:
        body: dict[str, object] = {"input": call[1], "encoding_format": "base64"}
        if not plain:
            body["adapter"] = call[0]
        client.post("/v1/embeddings", json=body).raise_for_status()

    began = time.perf_counter()
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(ask, calls))
    return time.perf_counter() - began


def seconds_of_peft(embed: Embed, adapters: PeftModel, calls: Sequence[Call]) -> float:
    began = time.perf_counter()
    for name, inputs in calls:
        adapters.set_adapter(name)
        embed(inputs)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--base", type=Path, required=True, help="the served base's folder")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--calls", type=int, default=64, help="of a turn")
    parser.add_argument("--texts", type=int, default=8, help="of a call, or images")
    parser.add_argument("--images", action="store_true", help="embed images in place of texts")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=options.url, timeout=300) as client,
    ):
        names = make_adapters(options.base, Path(folder), options.adapters)
        make = image_embedder if options.images else text_embedder
        plain, embed = make(options.base)
        tuned: PeftModel | None = None
        for name in names:
            path = Path(folder) / name
            files = {
                part: (path / part).read_bytes()
                for part in ("adapter_config.json", "adapter_model.safetensors")
            }
            client.put(f"/v1/adapters/{name}", files=files).raise_for_status()
            if tuned is None:  # PEFT changes the layers of the model in place
                tuned = PeftModel.from_pretrained(plain, path, adapter_name=name)
            else:
                tuned.load_adapter(path, adapter_name=name)
        assert tuned is not None
        calls = make_calls(names, options.calls, options.texts, images=options.images)
        peer = "transformers and PEFT" if options.images else "sentence-transformers"
        ways: dict[str, Callable[[], float]] = {
            "server, base": lambda: seconds_of_server(client, calls, options.clients, plain=True),
            "server, adapters": lambda: seconds_of_server(
                client, calls, options.clients, plain=False
            ),
            peer: lambda: seconds_of_peft(embed, tuned, calls),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns + 1):  # the first warms up
            for way, run in ways.items():
                taken = run()
                if turn:
                    seconds[way].append(taken)
        median = {way: statistics.median(each) for way, each in seconds.items()}
        n_texts = options.calls * options.texts
        for way, each in median.items():
            print(f"{way:22} {n_texts / each:8.1f} {'images' if options.images else 'texts'}/s")
        base, adapters, peft = median.values()
        print(f"with {options.adapters} adapters / without: {base / adapters:.2f}")
        print(f"server / {peer}: {peft / adapters:.2f}")


if __name__ == "__main__":
    main()
