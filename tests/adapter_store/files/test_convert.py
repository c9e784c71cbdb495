"""Pickles are opened elsewhere, weights-only, with little memory, and what comes out is checked."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapter_store.contents.convert import convert_directory, draw_posterior
from loraplex_adapter_store.errors import (
    LimitExceeded,
    MalformedFile,
    SourceError,
    UnsupportedAdapter,
)
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import MakeAdapter, plain_lora
from tests.support.adapters.plan_executor import plan_logits
from tests.support.adapters.round_trip import randomise
from tests.support.bases.tiny_models import PROMPT, read_path, tiny_llama, untouched

LIMITS = StoreLimits()


def pickled(folder: Path, value: object, name: str = "adapter_model.bin") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(plain_lora(1)[0]))
    torch.save(value, folder / name)
    return folder


def test_a_pickle_of_parameters_becomes_a_loadable_adapter(
    tmp_path: Path, store: AdapterStore
) -> None:
    tensors = plain_lora(1)[1]
    value = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()} | {"epoch": 3}
    done = convert_directory(pickled(tmp_path / "in", value), tmp_path / "out", LIMITS)
    assert done.tensors == tuple(sorted(tensors))
    assert done.dropped == ("epoch",)
    digest = store.put_directory("x", tmp_path / "out").digest
    config, _ = plain_lora(1)
    assert store.put_tensors("y", config, tensors).digest == digest  # type: ignore[arg-type]


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploited",))


def test_code_in_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(tmp_path / "in", {})
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Exploit()}))
    with pytest.raises(MalformedFile, match="weights-only"):
        convert_directory(folder, tmp_path / "out", LIMITS)
    torch.save({"a": Exploit()}, folder / "adapter_model.bin")
    with pytest.raises(MalformedFile, match="weights-only"):
        convert_directory(folder, tmp_path / "out", LIMITS)
    assert not list(tmp_path.rglob("exploited"))
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_unfolds_to_gigabytes_is_stopped(tmp_path: Path) -> None:
    bomb = {"a": torch.zeros(1).expand(1 << 32)}  # 16 GiB once it is copied
    folder = pickled(tmp_path / "in", bomb)
    assert (folder / "adapter_model.bin").stat().st_size < 10_000
    with pytest.raises(MalformedFile):
        convert_directory(folder, tmp_path / "out", LIMITS)
    assert not (tmp_path / "out").exists()


def test_what_is_not_an_adapter_says_so(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    with pytest.raises(SourceError, match="adapter_config"):
        convert_directory(tmp_path, tmp_path / "out", LIMITS)
    folder = pickled(tmp_path / "in", {"a": torch.zeros(1000)})
    with pytest.raises(LimitExceeded):
        convert_directory(folder, tmp_path / "out", StoreLimits(max_file_bytes=100))
    with pytest.raises(SourceError, match="exists already"):
        convert_directory(make_adapter(1), tmp_path / "in", LIMITS)


def test_a_mixlora_release_converts_with_its_old_file_names(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "in", {"a": torch.zeros(3)}, "mixlora_model.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (folder / "mixlora_config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").unlink()
    convert_directory(folder, tmp_path / "out", LIMITS)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "MIXLORA"


@pytest.mark.filterwarnings("ignore")
def test_initial_factors_make_a_randomised_pissa_servable(tmp_path: Path) -> None:
    model = tiny_llama()
    config = peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=["q_proj"])
    tuned = peft.get_peft_model(untouched(model), config)
    tuned.save_pretrained(tmp_path / "initial")
    randomise(tuned)
    tuned.eval().save_pretrained(tmp_path / "trained")
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits
    convert_directory(tmp_path / "trained", tmp_path / "out", LIMITS, initial=tmp_path / "initial")
    plan = read_path(tmp_path / "out", model).plan
    assert (plan_logits(model, plan, PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_a_residual_base_is_refused_until_it_is_repaired(
    tmp_path: Path, init: str
) -> None:
    """The steps of PiSSA's and BA-LoRA's scripts: the residual is a base, the adapter is plain."""
    model = tiny_llama()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=["v_proj"])
    tuned = peft.get_peft_model(untouched(model), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned = peft.PeftModel.from_pretrained(tuned.unload(), tmp_path / "start", is_trainable=True)
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "trained")
    with torch.inference_mode():
        expected = tuned.eval()(input_ids=PROMPT).logits
    with pytest.raises(
        UnsupportedAdapter, match=r"convert ADAPTER NEW --initial .* `--init pissa`"
    ):
        read_path(tmp_path / "trained", model)
    convert_directory(tmp_path / "trained", tmp_path / "a", LIMITS, initial=tmp_path / "start")
    convert_directory(tmp_path / "trained", tmp_path / "b", LIMITS, init=init)
    for repaired in ("a", "b"):
        plan = read_path(tmp_path / repaired, model).plan
        assert (plan_logits(model, plan, PROMPT) - expected).abs().max() < 1e-4
    with pytest.raises(SourceError, match="pissa and olora"):
        convert_directory(tmp_path / "trained", tmp_path / "c", LIMITS, init="corda")


def test_draws_of_a_posterior_are_adapters_of_their_own(
    tmp_path: Path, store: AdapterStore
) -> None:
    config, tensors = plain_lora(1)
    spread = {
        name.replace(".weight", ".log_std"): torch.full_like(tensor, -2.0)
        for name, tensor in tensors.items()
    }
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ABMLL"}))
    save_file({**tensors, **spread}, folder / "adapter_model.safetensors")
    drawn = draw_posterior(folder, tmp_path / "out", n_draws=3, seed=5, limits=StoreLimits())
    digests = {store.put_directory(f"draw/{i}", path).digest for i, path in enumerate(drawn)}
    assert len(digests) == 3


def test_a_posterior_in_a_damaged_file_is_refused(tmp_path: Path) -> None:
    config, tensors = plain_lora(1)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ABMLL"}))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with (tmp_path / "adapter_model.safetensors").open("ab") as file:
        file.write(b"stowaway")
    with pytest.raises(MalformedFile, match="truncated or padded"):
        draw_posterior(tmp_path, tmp_path / "out", n_draws=1, seed=0, limits=StoreLimits())
    assert not (tmp_path / "out").exists()
