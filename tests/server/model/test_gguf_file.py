"""GGUF files that cannot be served say what is wrong by its name, and what works."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.model.base_model import load_base_model
from loraplex_server.model.errors import ModelError
from loraplex_server.model.gguf.gguf_folder import gguf_folder
from tests.support.bases.gguf_checkpoint import save_as_gguf
from tests.support.bases.tiny_models import tiny_llama
from tests.support.bases.tiny_tokenizer import tiny_tokenizer

_T = GGMLQuantizationType


def written(path: Path, change: Callable[[GGUFWriter], None], architecture: str = "llama") -> Path:
    writer = GGUFWriter(path, architecture)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_two_bits(writer: GGUFWriter) -> None:
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 84), np.uint8), raw_dtype=_T.Q2_K)


def add_nothing(_: GGUFWriter) -> None:
    pass


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    save_as_gguf(tiny_llama(), tiny_tokenizer(), path, lambda _: _T.F16)
    return path


def test_an_unknown_architecture_is_named_with_those_that_are_served(tmp_path: Path) -> None:
    path = written(tmp_path / "it.gguf", add_nothing, architecture="mamba")
    with pytest.raises(ModelError, match=r"architecture 'mamba'; these .*llama, .*qwen2, qwen3"):
        gguf_folder(path, tmp_path)


def test_an_unknown_tensor_type_is_named_with_those_that_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "it.gguf", add_two_bits)
    with pytest.raises(ModelError, match=r"ffn_up.weight has the tensor type Q2_K; .*Q8_0.*Q4_K"):
        gguf_folder(path, tmp_path)


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "it.gguf", add_nothing)
    with pytest.raises(ModelError, match=r"has no llama.context_length"):
        gguf_folder(path, tmp_path)


def test_a_file_that_is_cut_off_or_no_gguf_is_refused(served: Path, tmp_path: Path) -> None:
    whole = served.read_bytes()
    for n_bytes, reason in ((len(whole) - 200, "ends before"), (700, "cut off|buffer")):
        served.write_bytes(whole[:n_bytes])
        with pytest.raises(ModelError, match=reason):
            gguf_folder(served, tmp_path)
    served.write_bytes(b"PK" + whole)
    with pytest.raises(ModelError, match="does not begin with GGUF"):
        gguf_folder(served, tmp_path)


def test_a_tensor_that_the_architecture_lacks_is_refused(served: Path, tmp_path: Path) -> None:
    folder = gguf_folder(served, tmp_path)
    served.write_bytes(served.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"blk.0.ffn_xx.weight, which 'llama' has no place for"):
        load_base_model(folder, "tiny", dtype=torch.float32, device=torch.device("cpu"))


def test_a_file_is_not_quantised_again(served: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leave --quantization out"):
        load_base_model(
            gguf_folder(served, tmp_path),
            "tiny",
            dtype=torch.float32,
            device=torch.device("cpu"),
            quantization=WeightFormat.INT8,
        )
