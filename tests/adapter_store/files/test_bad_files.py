"""Hostile, damaged and merely wrong files: a clear error, no effect, no crash."""

import contextlib
import json
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import (
    AdapterMismatch,
    AdapterRefused,
    LimitExceeded,
    MalformedFile,
    PickleRefused,
    SourceError,
    SourceForbidden,
    UnsupportedAdapter,
)
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile, parse_json_object
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import MakeAdapter, plain_lora

LIMITS = StoreLimits()


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(**values: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **values}


BROKEN: dict[str, tuple[object, bytes]] = {
    "not JSON": (b"{nope", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "an array": ([1], b""),
    "no tensors": ({}, b""),
    "only metadata": ({"__metadata__": {"a": "b"}}, b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "t": entry()}, bytes(8)),
    "duplicate names": (b'{"t": {}, "t": {}}', b""),
    "nan in the header": (b'{"t": NaN}', b""),
    "deeply nested": (b"[" * 100_000 + b"]" * 100_000, b""),
    "no dtype": ({"t": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "an extra field": ({"t": entry(extra=1)}, bytes(8)),
    "unknown dtype": ({"t": entry(dtype="F8_E4M3")}, bytes(8)),
    "negative size": ({"t": entry(shape=[-2])}, bytes(8)),
    "boolean size": ({"t": entry(shape=[True, 2])}, bytes(8)),
    "fractional size": ({"t": entry(shape=[2.0])}, bytes(8)),
    "huge size": ({"t": entry(shape=[1 << 60])}, bytes(8)),
    "overflowing product": ({"t": entry(shape=[1 << 40, 1 << 40])}, bytes(8)),
    "too many dimensions": ({"t": entry(shape=[1] * 8 + [2])}, bytes(8)),
    "offsets reversed": ({"t": entry(data_offsets=[8, 0])}, bytes(8)),
    "offsets past the end": ({"t": entry(data_offsets=[8, 16])}, bytes(8)),
    "offsets of the wrong length": ({"t": entry(data_offsets=[0, 4])}, bytes(8)),
    "three offsets": ({"t": entry(data_offsets=[0, 4, 8])}, bytes(8)),
    "overlap": ({"t": entry(), "u": entry(data_offsets=[4, 12])}, bytes(12)),
    "a hole": ({"t": entry(), "u": entry(data_offsets=[12, 20])}, bytes(20)),
    "truncated data": ({"t": entry()}, bytes(7)),
    "trailing data": ({"t": entry()}, bytes(9)),
    "an empty name": ({"": entry()}, bytes(8)),
    "a control character": ({"a\u0000b": entry()}, bytes(8)),
}


@pytest.mark.parametrize(("header", "data"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_header_is_refused_before_mapping(
    header: object, data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(MalformedFile):
        SafetensorsFile(file_of(tmp_path, header, data), LIMITS)


@pytest.mark.parametrize("length", [1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_false_header_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(MalformedFile):
        SafetensorsFile(file_of(tmp_path, {"t": entry()}, bytes(8), length), LIMITS)


def test_counts_and_sizes_are_limited(tmp_path: Path) -> None:
    header = {f"t{i}": entry(data_offsets=[8 * i, 8 * i + 8]) for i in range(5)}
    file = file_of(tmp_path, header, bytes(40))
    SafetensorsFile(file, LIMITS).close()
    with pytest.raises(LimitExceeded, match="tensors"):
        SafetensorsFile(file, StoreLimits(max_tensors=3))
    with pytest.raises(LimitExceeded, match="bytes"):
        SafetensorsFile(file, StoreLimits(max_file_bytes=100))


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploited",))


def test_pickle_is_recognised_and_never_opened(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(plain_lora(1)[0]))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(PickleRefused, match="adapters convert"):
        store.put_directory("x", folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused):
        store.put_directory("x", folder)
    torch.save({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(PickleRefused):
        store.put_directory("x", folder)
    assert not (tmp_path / "exploited").exists()
    assert store.list() == ()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_gives_an_error_or_the_same_tensors(data: st.DataObject, tmp_path: Path) -> None:
    good = save(plain_lora(2)[1])
    damaged = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "splice"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        damaged[at : at + 16] = data.draw(st.binary(min_size=16, max_size=16))
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damaged)
    try:
        with SafetensorsFile(file, LIMITS) as opened:
            tensors = [opened.load(name) for name in opened.entries]
    except AdapterRefused:
        return
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=200))
def test_any_bytes_as_config_give_an_object_or_an_error(text: bytes) -> None:
    with contextlib.suppress(AdapterRefused):
        assert isinstance(parse_json_object(text, "config", 1000), dict)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "layers_to_transform", "modules_to_save", "init_lora_weights"),
    *("exclude_modules", "layers_pattern", "trainable_token_indices", "use_bdlora"),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=3))
def test_any_config_is_served_or_refused_and_never_crashes(
    changes: dict[str, object], store: AdapterStore
) -> None:
    config, tensors = plain_lora(3)
    try:
        store.put_files("fuzzed", json.dumps({**config, **changes}).encode(), save(tensors))
    except AdapterRefused:
        assert not any(card.name == "fuzzed" for card in store.list())
    else:
        store.delete("fuzzed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(
    bad: float, dtype: torch.dtype, store: AdapterStore
) -> None:
    config, tensors = plain_lora(1)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    name = next(iter(tensors))
    tensors[name][0, 0] = bad
    with pytest.raises(MalformedFile, match="NaN or Inf") as caught:
        store.put_files("x", json.dumps(config).encode(), save(tensors))
    assert name in str(caught.value)


def test_integer_factors_are_refused(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    tensors = {name: tensor.to(torch.int64) for name, tensor in tensors.items()}
    with pytest.raises(MalformedFile, match="floating-point"):
        store.put_files("x", json.dumps(config).encode(), save(tensors))


def test_a_rank_above_the_limit_is_refused(base: BaseSpec, tmp_path: Path) -> None:
    config, tensors = plain_lora(1, rank=9)
    with (
        AdapterStore(tmp_path / "s", base, limits=StoreLimits(max_rank=8)) as store,
        pytest.raises(LimitExceeded, match="rank 9"),
    ):
        store.put_tensors("x", config, tensors)  # type: ignore[arg-type]


def put(store: AdapterStore, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    store.put_files("x", json.dumps(config).encode(), save(tensors))


def test_unmatched_tensors_are_named(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    with pytest.raises(AdapterMismatch, match=r"layers\.9") as caught:
        put(store, config, tensors)
    assert caught.value.unexpected_keys == (
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
    )


def test_a_wrong_prefix_cannot_load_as_a_no_op(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    renamed = {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}
    with pytest.raises(AdapterMismatch, match="targeted by the config, has no tensors"):
        put(store, config, renamed)


def test_a_target_without_tensors_is_named(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["target_modules"] = ["q_proj", "v_proj"]
    with pytest.raises(AdapterMismatch) as caught:
        put(store, config, tensors)
    assert "model.layers.0.self_attn.v_proj" in caught.value.missing_keys


def test_tensors_that_the_config_does_not_target_are_named(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["target_modules"] = ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(AdapterMismatch, match="not targeted by the config"):
        put(store, config, tensors)


def test_targets_that_exist_nowhere_cannot_load_as_a_no_op(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["target_modules"] = ["Wqkv"]
    with pytest.raises(AdapterMismatch):
        put(store, config, tensors)


def test_a_rank_that_contradicts_the_config_is_refused_for_its_scale(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["r"] = 8
    with pytest.raises(AdapterMismatch, match="scale would be wrong"):
        put(store, config, tensors)


def test_wrong_shapes_say_what_the_base_needs(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.ones(4, 33)
    with pytest.raises(AdapterMismatch, match=r"\[4, 33\], the base needs \[4, 32\]"):
        put(store, config, tensors)


def test_code_in_the_config_is_refused(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["auto_map"] = {"AutoModel": "evil.Model"}
    with pytest.raises(UnsupportedAdapter, match="run code"):
        put(store, config, tensors)


@pytest.mark.parametrize(
    "field",
    [
        "target_modules",
        *(pytest.param(f, marks=pytest.mark.nightly) for f in ("exclude_modules", "rank_pattern")),
    ],
)
def test_a_pattern_built_to_backtrack_is_refused_within_its_budget(
    store: AdapterStore, field: str
) -> None:
    config, tensors = plain_lora(1)
    pattern = r"(.|..|...)+[A-Z]+[0-9]"
    config[field] = {pattern: 4} if field == "rank_pattern" else pattern
    started = time.process_time()
    with pytest.raises(MalformedFile, match="too long to match"):
        put(store, config, tensors)
    assert time.process_time() - started < 30


@pytest.mark.parametrize("field", ["target_modules", "layers_pattern", "modules_to_save"])
def test_a_broken_pattern_is_refused_by_name(store: AdapterStore, field: str) -> None:
    config, tensors = plain_lora(1)
    config |= {"layers_to_transform": [0, 1, 2], field: "(q_proj"}
    with pytest.raises(MalformedFile, match=r"bad pattern .*\(q_proj"):
        put(store, config, tensors)


def test_a_field_that_no_reader_acts_on_is_refused_by_name(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["scale_by_position"] = 2.0
    with pytest.raises(UnsupportedAdapter, match=r"scale_by_position: 2\.0"):
        put(store, config, tensors)


@pytest.mark.parametrize("unset", [None, False, "", [], {}], ids=repr)
def test_an_unknown_field_that_is_not_set_says_nothing(store: AdapterStore, unset: object) -> None:
    config, tensors = plain_lora(1)
    config["use_a_later_invention"] = unset
    put(store, config, tensors)
    assert store.get("x").revision == 1


def test_training_options_are_no_reason_to_refuse(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config |= {"lora_dropout": 0.1, "inference_mode": True, "peft_version": "0.19.0"}
    config |= {"megatron_core": "megatron.core", "qalora_group_size": 16}
    put(store, config, tensors)
    assert store.get("x").revision == 1


def test_an_adapter_of_another_base_is_refused_by_fingerprint(store: AdapterStore) -> None:
    config, tensors = plain_lora(1)
    config["loraplex_base_fingerprint"] = "0" * 64
    with pytest.raises(AdapterRefused, match="fingerprint"):
        put(store, config, tensors)


def test_another_declared_base_is_a_warning_or_an_error(base: BaseSpec, tmp_path: Path) -> None:
    config, tensors = plain_lora(1)
    config["base_model_name_or_path"] = "org/another-model"
    with AdapterStore(tmp_path / "a", base) as store:
        put(store, config, tensors)
        report = store.get("x").report
        assert report is not None
        assert "another-model" in report.warnings[0]
    limits = StoreLimits(refuse_other_base=True)
    with (
        AdapterStore(tmp_path / "b", base, limits=limits) as store,
        pytest.raises(AdapterRefused, match="another-model"),
    ):
        put(store, config, tensors)


@pytest.mark.parametrize("uri", ["/etc", "../../etc", "file:///etc", "{root}/../outside"])
def test_directories_outside_the_allowed_roots_are_forbidden(
    uri: str, store: AdapterStore, tmp_path: Path
) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "outside").mkdir()
    with pytest.raises(SourceForbidden):
        store.put_source("x", uri.format(root=tmp_path / "adapters"))


def test_symlinks_cannot_leave_the_allowed_roots(
    store: AdapterStore, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    inside = make_adapter(1)
    outside = tmp_path / "secret.safetensors"
    (inside / "adapter_model.safetensors").rename(outside)
    (inside / "adapter_model.safetensors").symlink_to(outside)
    with pytest.raises(SourceForbidden, match="link"):
        store.put_source("x", str(inside))
    link = tmp_path / "adapters" / "link"
    link.symlink_to("/etc")
    with pytest.raises(SourceForbidden):
        store.put_source("x", str(link))


def test_pipes_and_devices_are_not_read(store: AdapterStore, make_adapter: MakeAdapter) -> None:
    folder = make_adapter(1)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        store.put_source("x", str(folder))


@pytest.mark.parametrize("uri", ["ftp://host/a", "hf://only-one-part", "hf://a/b/../c", "s3:///"])
def test_unknown_or_malformed_sources_say_so(uri: str, store: AdapterStore) -> None:
    with pytest.raises(SourceError):
        store.put_source("x", uri)
