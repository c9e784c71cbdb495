"""Adapter files: a good LoRA of the tiny base, and what can be wrong with one."""

import json
import random
import struct
from collections.abc import Mapping
from typing import Any

from .values import damaged, deepened, mutated, odd_value

HIDDEN, RANK, LAYERS = 64, 4, 3
OUT = {"q_proj": 64, "v_proj": 32}
PEFT_TYPES = (
    *(
        "LORA",
        "LOHA",
        "LOKR",
        "ADALORA",
        "OFT",
        "BOFT",
        "IA3",
        "VERA",
        "FOURIERFT",
        "HRA",
        "VBLORA",
    ),
    *(
        "LN_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "TRAINABLE_TOKENS",
        "C3A",
        "SHIRA",
    ),
    *("ROAD", "RANDLORA", "MISS", "XLORA", "FULL", "MIXLORA", "MOLA", "lora", "", "NOPE"),
)
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X", "")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny",
    "r": RANK,
    "lora_alpha": RANK,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "fan_in_fan_out": False,
}
CONFIG_VALUES: dict[str, tuple[Any, ...]] = {
    "r": (0, -1, 1, 8, 10**4000, 1 << 40, 1.5, "4", None),
    "lora_alpha": (0, 1e308, -1e308, 1e-320, "16", None, 10**400),
    "target_modules": ("all-linear", ".*", "(..|.|...)*!", "(a+)+$", [], ["x"], "[", None, [None]),
    "modules_to_save": (["lm_head"], ["norm"], ["../x"], "lm_head"),
    "rank_pattern": ({"q_proj": 8}, {"(a+)+$": 2}, {"q_proj": -1}, []),
    "alpha_pattern": ({"q_proj": 1e308}, {"[": 1}),
    "layers_to_transform": ([0], [99], [-1], "all", 0),
    "use_dora": (True, "yes"),
    "use_rslora": (True,),
    "bias": ("all", "lora_only", "x"),
    "init_lora_weights": ("pissa", "loftq", False),
    "auto_mapping": ({"base_model_class": "os.system"},),
    "revision": ("../..", "\0"),
    "layer_replication": ([[0, 1], [0, 3]],),
    "trainable_token_indices": ([1, 2], [1 << 40], [-1]),
    "exclude_modules": ("(a+)+$", ["q_proj"]),
}
TENSOR_NAMES = (
    *("../../etc/passwd", "a\0b", "", "ü", "lora_A", "x" * 3000, "base_model.model.lm_head.weight"),
    *("__metadata__", "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", "."),
    *("base_model.model.model.embed_tokens.lora_embedding_A", "modules_to_save.weight", "\ud800"),
)


def config_bytes(rng: random.Random, *, is_good: bool) -> bytes:
    config = dict(CONFIG)
    if is_good:
        return json.dumps(config).encode()
    for _ in range(rng.randrange(1, 3)):
        field = rng.choice(list(CONFIG_VALUES))
        config[field] = rng.choice(CONFIG_VALUES[field])
    if rng.random() < 0.2:
        config["peft_type"] = rng.choice(PEFT_TYPES)
    if rng.random() < 0.3:
        config = mutated(rng, config, rng.randrange(1, 4))
    if rng.random() < 0.05:
        config = deepened(rng, config)
    try:
        data = json.dumps(config).encode()
    except ValueError:  # an int of thousands of digits
        data = json.dumps({**CONFIG, "r": 0}).encode().replace(b'"r": 0', b'"r": 1' + b"0" * 4000)
    return damaged(rng, data) if rng.random() < 0.15 else data


def weights_bytes(rng: random.Random, *, is_good: bool) -> bytes:
    """A safetensors file: length of the header, header, data."""
    header, data = _lora(rng)
    if is_good or rng.random() < 0.2:
        return _file(header, data)
    for _ in range(rng.randrange(1, 4)):
        _spoil(rng, header)
    if rng.random() < 0.2:
        header = mutated(rng, header, rng.randrange(1, 4))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    whole = _file(header, data)
    if rng.random() < 0.15:
        claimed = rng.choice((0, 1, len(whole), len(whole) + 1, 1 << 31, 1 << 62, (1 << 64) - 1))
        whole = struct.pack("<Q", claimed) + whole[8:]
    return damaged(rng, whole) if rng.random() < 0.2 else whole


def _lora(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    data = bytearray()
    scale = rng.choice((0.1, 0.1, 0.1, 0.0, 1e30, 3e38, float("inf"), float("nan"), 1e-40))
    for layer in range(LAYERS):
        for module, out in OUT.items():
            for part, shape in (("lora_A", [RANK, HIDDEN]), ("lora_B", [out, RANK])):
                n = shape[0] * shape[1]
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{part}.weight"
                begin = len(data)
                value = struct.pack("<2f", scale, -0.05)
                data += value * (n // 2)
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    return header, bytes(data)


def _spoil(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict) or "shape" not in entry:
        return
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return  # spoilt already
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice((*DTYPES, 5, None))
        case 1:
            entry["shape"] = rng.choice(([], [0], [-1, 4], [1 << 62, 4], [1.5], [shape], "x", None))
        case 2:
            entry["shape"] = [shape[1], shape[0]] if len(shape) == 2 else [1] * 70
        case 3:
            entry["data_offsets"] = rng.choice(
                (
                    [0, 1 << 63],
                    [-1, 4],
                    offsets[::-1],
                    [0, 0],
                    [0],
                    [0.5, 2],
                    None,
                    [1 << 70, 1 << 71],
                )
            )
        case 4:
            entry["data_offsets"] = [offsets[0] + 4, offsets[1] + 4]
        case 5:
            header[rng.choice(TENSOR_NAMES)] = header.pop(name)
        case 6:
            del header[name]
        case 7:
            header["__metadata__"] = rng.choice(
                ({"format": "pt"}, {"a": 1}, [], "x", odd_value(rng))
            )
        case _:
            entry[rng.choice(("dtype", "extra", "shape"))] = odd_value(rng)


def _file(header: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data
