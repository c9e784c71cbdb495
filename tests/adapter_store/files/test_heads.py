"""Classifier heads and pooling files: what is read, and what is refused with a reason."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.names.selector import Mixture, MixturePart, NameRef
from loraplex_adapter_store.plan import Activation, AdapterPlan, HeadTask, PoolingMode, PoolingPlan
from loraplex_adapter_store.sources.local import read_directory
from loraplex_adapter_store.store import AdapterStore
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.tiny_models import tiny_llama

_HIDDEN = 32


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_llama(), "tiny")


@pytest.fixture
def store(spec: BaseSpec, tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", spec, allowed_roots=[tmp_path]) as store:
        yield store


def _write(
    folder: Path,
    spec: BaseSpec,
    head: dict[str, Tensor],
    *,
    task: str | None = "SEQ_CLS",
    files: dict[str, object] | None = None,
    **config: object,
) -> Path:
    write_lora(folder, spec)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({**weights, **head}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": task, **config}))
    for name, value in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def _plan(store: AdapterStore, folder: Path) -> AdapterPlan:
    store.put_directory("x", folder)
    with store.acquire("x") as lease:
        return lease.plan


def _score(n_labels: int = 3) -> dict[str, Tensor]:
    return {"base_model.model.score.weight": torch.randn(n_labels, _HIDDEN)}


@pytest.mark.parametrize(
    "name",
    ["score", "classifier", "verdict"],
)
@pytest.mark.parametrize("spelled", ["{}", "{}.modules_to_save", "{}.modules_to_save.default"])
def test_a_head_is_found_by_each_of_its_names(
    name: str, spelled: str, spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    weight, bias = torch.randn(3, _HIDDEN), torch.randn(3)
    path = f"base_model.model.{spelled.format(name)}"
    tensors = {f"{path}.weight": weight, f"{path}.bias": bias}
    folder = _write(tmp_path / "a", spec, tensors, modules_to_save=[name])
    head = _plan(store, folder).head
    assert head is not None
    assert torch.equal(head.weight, weight)
    assert head.bias is not None
    assert torch.equal(head.bias, bias)
    assert store.get("x").task is HeadTask.SEQ_CLS
    assert [card.task for card in store.list()] == [HeadTask.SEQ_CLS]


def test_the_task_may_stand_in_the_class_that_was_trained(
    spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    trained = {"base_model_class": "LlamaForTokenClassification", "parent_library": "transformers"}
    folder = _write(tmp_path / "a", spec, _score(), task=None, auto_mapping=trained)
    head = _plan(store, folder).head
    assert head is not None
    assert head.task is HeadTask.TOKEN_CLS


@pytest.mark.parametrize(
    ("config", "n_labels", "activation"),
    [
        ({}, 3, Activation.SOFTMAX),
        ({}, 1, Activation.SIGMOID),
        ({"problem_type": "multi_label_classification"}, 3, Activation.SIGMOID),
        ({"problem_type": "regression"}, 1, Activation.NONE),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            1,
            Activation.NONE,
        ),
    ],
)
def test_labels_and_activation_come_from_the_model_s_config(
    config: dict[str, object],
    n_labels: int,
    activation: Activation,
    spec: BaseSpec,
    store: AdapterStore,
    tmp_path: Path,
) -> None:
    names = {str(index): f"is {index}" for index in range(n_labels)}
    files = {"config.json": {**config, "id2label": names}}
    folder = _write(tmp_path / "a", spec, _score(n_labels), files=files)
    head = _plan(store, folder).head
    assert head is not None
    assert head.labels == tuple(names.values())
    assert head.activation is activation
    bare = _write(tmp_path / "b", spec, {k: v.clone() for k, v in _score(n_labels).items()})
    plain = _plan(store, bare).head
    assert plain is not None
    assert plain.labels == tuple(f"LABEL_{index}" for index in range(n_labels))


def test_other_labels_are_another_content(
    spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    head = _score(2)
    digests = set()
    for word in ("yes", "no"):
        files = {"config.json": {"id2label": {"0": word, "1": "other"}}}
        digests.add(_plan(store, _write(tmp_path / word, spec, head, files=files)).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("head", "config", "files", "reason"),
    [
        ({}, {}, {}, "no classifier"),
        (
            {"base_model.model.classifier.out_proj.weight": torch.ones(2, _HIDDEN)},
            {},
            {},
            "classifier.out_proj",
        ),
        ({"base_model.model.score.weight": torch.ones(3, 7)}, {}, {}, "needs"),
        ({**_score(), "base_model.model.classifier.weight": torch.ones(2, _HIDDEN)}, {}, {}, "2 h"),
        (_score(), {"id2label": {"0": "a"}}, {}, "names 1 labels"),
        (_score(), {"id2label": ["a", "b", "c"]}, {}, "an object of names"),
        (_score(), {}, {"config.json": {"problem_type": "ranking"}}, "problem_type"),
        (_score(), {}, {"config.json": [1]}, "an object is needed"),
        (
            _score(),
            {},
            {"config.json": {"sentence_transformers": {"activation_fn": "torch.nn.GELU"}}},
            "activation_fn",
        ),
        ({"base_model.model.score.weight": torch.zeros(3, _HIDDEN) / 0}, {}, {}, "NaN or Inf"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused(
    head: dict[str, Tensor],
    config: dict[str, object],
    files: dict[str, object],
    reason: str,
    spec: BaseSpec,
    store: AdapterStore,
    tmp_path: Path,
) -> None:
    folder = _write(tmp_path / "a", spec, head, files=files, **config)
    with pytest.raises(AdapterRefused) as refused:
        store.put_directory("x", folder)
    assert reason in str(refused.value)


def test_a_head_without_a_task_is_an_unexpected_key(
    spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused, match="match nothing"):
        store.put_directory("x", _write(tmp_path / "a", spec, _score(), task="CAUSAL_LM"))


_MODULES = [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "Pooling")]
_NORMALIZE = {"type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize(
    ("files", "pooling"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_lasttoken": True}}, (PoolingMode.LAST, True)),
        (
            {
                "1_Pooling/config.json": {"pooling_mode": "mean"},
                "modules.json": [*_MODULES, _NORMALIZE],
            },
            (PoolingMode.MEAN, True),
        ),
        (
            {"1_Pooling/config.json": {"pooling_mode_cls_token": True}, "modules.json": _MODULES},
            (PoolingMode.CLS, False),
        ),
    ],
)
def test_pooling_is_read_from_sentence_transformers_files(
    files: dict[str, object],
    pooling: tuple[PoolingMode, bool],
    spec: BaseSpec,
    store: AdapterStore,
    tmp_path: Path,
) -> None:
    plan = _plan(store, _write(tmp_path / "a", spec, {}, task="FEATURE_EXTRACTION", files=files))
    assert plan.pooling == PoolingPlan(*pooling)
    bare = _plan(store, _write(tmp_path / "b", spec, {}, task="FEATURE_EXTRACTION"))
    assert bare.pooling is None
    assert bare.digest != plan.digest


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {
                "1_Pooling/config.json": {
                    "pooling_mode_mean_tokens": True,
                    "pooling_mode_max_tokens": True,
                }
            },
            "2 modes",
        ),
        ({"1_Pooling/config.json": {"pooling_mode": "median"}}, "median"),
        ({"1_Pooling/config.json": {}}, "0 modes"),
        (
            {"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}},
            "include_prompt",
        ),
        (
            {"modules.json": [*_MODULES, {"type": "sentence_transformers.models.Dense"}]},
            "'Dense'",
        ),
        ({"modules.json": {"0": "Pooling"}}, "not a list"),
    ],
)
def test_pooling_that_is_not_served_is_refused(
    files: dict[str, object], reason: str, spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused) as refused:
        store.put_directory("x", _write(tmp_path / "a", spec, {}, task=None, files=files))
    assert reason in str(refused.value)


def test_a_pooling_file_that_leads_out_of_the_root_is_refused(
    spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-secret.json"
    outside.write_text('{"pooling_mode": "mean"}')
    folder = _write(tmp_path / "a", spec, {}, task=None)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").symlink_to(outside)
    with pytest.raises(Exception, match="leaves the allowed roots"):
        store.put_source("x", str(folder))
    outside.unlink()


def test_a_classifier_stands_in_no_mixture(
    spec: BaseSpec, store: AdapterStore, tmp_path: Path
) -> None:
    store.put_directory("judge", _write(tmp_path / "a", spec, _score()))
    store.put_directory("poet", write_lora(tmp_path / "b", spec, seed=5))
    with pytest.raises(Exception, match="head cannot be added up"):
        store.acquire(Mixture(tuple(MixturePart(NameRef(n), 0.5) for n in ("judge", "poet"))))


def test_a_folder_without_these_files_reads_none(spec: BaseSpec, tmp_path: Path) -> None:
    from loraplex_adapter_store.limits import StoreLimits

    assert read_directory(write_lora(tmp_path / "a", spec), StoreLimits()).companions == {}
