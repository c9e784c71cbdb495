"""Checkpoints that others wrote quantised: their own library's weights, or a refusal by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.model.base_model import BaseModel, load_base_model
from loraplex_server.model.errors import ModelError
from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.tiny_base import save_base
from tests.support.bases.awq_checkpoint import awq_config, awq_tensors

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
_LLAMA = next(row for row in BASE_ROWS if row.id == "llama-biases")  # 64 wide, MLPs of 96


def saved(
    folder: Path, config: Mapping[str, object], write: Callable[[str, Tensor], Tensors]
) -> Path:
    """A checkpoint whose linears ``write`` turned into other tensors, by leaf."""
    save_base(_LLAMA, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        made = write(module, tensors.pop(name))
        tensors |= {f"{module}.{leaf}": part.contiguous() for leaf, part in made.items()}
    save_file(tensors, folder / "model.safetensors")
    with_config(folder, config)
    return folder


def with_config(folder: Path, config: Mapping[str, object]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


def loaded(folder: Path) -> BaseModel:
    """Held against transformers' forward over its weights, as at the start of a server."""
    return load_base_model(folder, "tiny", dtype=torch.float32, device=CPU, self_check=True)


def assert_weights(base: BaseModel, wanted: Tensors, quantization: str) -> None:
    assert base.spec.quantization == quantization
    for name, weight in wanted.items():
        assert torch.equal(base.spec.weight(name), weight), name


def compressed(form: str, weights: Mapping[str, object], **more: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT4_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNELS = {"strategy": "channel"}
SCHEMES: list[tuple[str, dict[str, object], str]] = [
    ("pack-quantized", INT4_GROUPS, "int4"),
    ("pack-quantized", {"num_bits": 4, "type": "int", **CHANNELS}, "int4"),
    ("pack-quantized", {"num_bits": 8, "type": "int", **CHANNELS}, "int8"),
    ("pack-quantized", {**INT4_GROUPS, "num_bits": 8}, "int8"),
    ("int-quantized", {"num_bits": 8, "type": "int", **CHANNELS}, "int8"),
    ("float-quantized", {"num_bits": 8, "type": "float", **CHANNELS}, "fp8"),
]


@pytest.mark.parametrize(("form", "weights", "format"), SCHEMES)
def test_compressed_tensors_has_the_weights_that_its_library_makes(
    form: str, weights: dict[str, object], format: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(form)
    wanted: Tensors = {}

    def write(name: str, weight: Tensor) -> Tensors:
        size = int(str(weights.get("group_size", weight.shape[1])))
        largest = (
            448.0 if weights["type"] == "float" else 2.0 ** (int(str(weights["num_bits"])) - 1)
        )
        scale = weight.unflatten(1, (-1, size)).abs().amax(-1) / largest
        state = {"weight": weight, "weight_scale": scale}
        made: Tensors = compressor.compress(state, scheme)
        wanted[name] = compressor.decompress(made, scheme)["weight"]
        return made

    base = loaded(saved(tmp_path / "base", compressed(form, weights), write))
    assert_weights(base, wanted, format)


def words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, m] → int32 [n, m · bits / 32], bit by bit."""
    per_word = 32 // bits
    found = torch.zeros(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        found |= codes[:, i::per_word].long() << (bits * i)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_is_codes_less_the_middle_times_the_scale(
    bits: int, version: str, group_size: int, tmp_path: Path
) -> None:
    """W = (code - 2^(bits-1)) · scale, packed along the inputs; zeros are stored less 1 in v1."""
    wanted: Tensors = {}
    middle = 2 ** (bits - 1)

    def write(name: str, weight: Tensor) -> Tensors:
        n_out, n_in = weight.shape
        size = group_size if group_size > 0 else n_in
        scales = (weight.view(n_out, -1, size).abs().amax(-1) / (middle - 1)).half()
        steps = scales.float().repeat_interleave(size, dim=1)
        codes = ((weight / steps).round() + middle).clamp(0, 2 * middle - 1).to(torch.uint8)
        wanted[name] = (codes.float() - middle) * steps
        zero = middle if version == "gptq_v2" else middle - 1
        zeros = torch.full((n_in // size, n_out), zero, dtype=torch.uint8)
        return {
            "qweight": words(codes, bits).t(),
            "scales": scales.t(),
            "qzeros": words(zeros, bits),
            "g_idx": (torch.arange(n_in) // size).int(),
        }

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": version,
    }
    base = loaded(saved(tmp_path / "base", config, write))
    assert_weights(base, wanted, f"int{bits}")


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq_is_codes_less_their_zero_times_the_scale(group_size: int, tmp_path: Path) -> None:
    wanted: Tensors = {}

    def write(name: str, weight: Tensor) -> Tensors:
        size = group_size if group_size > 0 else weight.shape[1]
        stored, wanted[name] = awq_tensors(weight, size)
        return stored

    base = loaded(saved(tmp_path / "base", awq_config(group_size), write))
    assert_weights(base, wanted, "int4")


@pytest.mark.parametrize("scales", ["of blocks", "of outputs", "of the tensor"])
def test_fp8_is_e4m3_times_its_scale(scales: str, tmp_path: Path) -> None:
    wanted: Tensors = {}

    def write(name: str, weight: Tensor) -> Tensors:
        codes = (100 * weight).to(torch.float8_e4m3fn)
        if scales == "of blocks":  # of 128 × 128, so one for each of these
            scale = torch.full((1, 1), 0.013)
        elif scales == "of outputs":
            scale = torch.linspace(0.01, 0.02, weight.shape[0])[:, None]
        else:
            scale = torch.tensor(0.011)
        wanted[name] = codes.float() * scale
        leaf = "weight_scale_inv" if scales == "of blocks" else "weight_scale"
        return {"weight": codes, leaf: scale, "input_scale": torch.tensor(1.0)}

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    base = loaded(saved(tmp_path / "base", config, write))
    assert_weights(base, wanted, "fp8")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "awq for vectors": ({**awq_config(32), "version": "gemv"}, "'gemv'; 4 in 'gemm' are read"),
    "awq of 8 bits": ({**awq_config(32), "bits": 8}, "awq with 8 bits .* load .* 16-bit"),
    "awq without codes": (awq_config(32), "it has no qweight"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not one of"),
    "mxfp4": ({"quant_method": "mxfp4"}, "'mxfp4'"),
    "desc_act": ({**GPTQ, "desc_act": True}, "desc_act"),
    "3 bits": ({**GPTQ, "bits": 3}, "3 bits; 4 and 8 are read"),
    "nvfp4": (compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "nvfp4"),
    "zero points": (compressed("pack-quantized", {**INT4_GROUPS, "symmetric": False}), "symmetric"),
    "actorder": (compressed("pack-quantized", {**INT4_GROUPS, "actorder": "group"}), "actorder"),
    "2 bits": (compressed("pack-quantized", {**INT4_GROUPS, "num_bits": 2}), "2 bits of int"),
    "tensors of another form": (GPTQ, "it has no qweight"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(_LLAMA, tmp_path_factory.mktemp("plain") / "base")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, said = REFUSED[case]
    folder = saved(tmp_path / "base", config, lambda _, w: {"weight": w, "weight_scale": w[:1] + 1})
    with pytest.raises(ModelError, match=said):
        loaded(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "it lacks model.norm.weight"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "no place for model.extra"),
        (
            lambda t: t.update({"model.more.weight_scale": torch.ones(2)}),
            "model.more of .* cannot be read: .*it has no weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    change: Callable[[Tensors], object], said: str, tmp_path: Path
) -> None:
    def write(_: str, weight: Tensor) -> Tensors:
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}

    folder = saved(tmp_path / "base", {"quant_method": "fp8"}, write)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        loaded(folder)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", GPTQ, lambda _, w: {"weight": w})
    with pytest.raises(ModelError, match="quantised already; leave --quantization out"):
        load_base_model(
            folder, "tiny", dtype=torch.float32, device=CPU, quantization=WeightFormat.INT8
        )


@pytest.mark.parametrize("format", list(WeightFormat))
def test_a_quantised_base_is_another_base_and_takes_less_memory(
    format: WeightFormat, plain: Path
) -> None:
    bases = [
        load_base_model(
            plain,
            "tiny",
            dtype=torch.bfloat16,
            device=CPU,
            quantization=chosen,
            exponent_coding=False,  # which takes a quarter off the plain weights
        )
        for chosen in (None, format)
    ]
    assert bases[0].spec.fingerprint != bases[1].spec.fingerprint
    assert [base.spec.quantization for base in bases] == [None, format]
    assert bases[0].spec.parameters == bases[1].spec.parameters
    of_layers = [
        sum(group.packed.n_bytes for group in base.groups.values() if group is not base.head)
        for base in bases
    ]
    # fp8 is dequantised on a CPU
    most = {WeightFormat.INT4: 0.4, WeightFormat.INT8: 0.6, WeightFormat.FP8: 1.0}
    assert of_layers[1] <= most[format] * of_layers[0]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = save_base(_LLAMA, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj: a weight that is not finite"):
        load_base_model(
            folder, "tiny", dtype=torch.bfloat16, device=CPU, quantization=WeightFormat.FP8
        )
