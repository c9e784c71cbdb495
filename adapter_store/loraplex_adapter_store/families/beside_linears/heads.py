"""Classifier heads, as PEFT saves them for task types SEQ_CLS and TOKEN_CLS.

    base_model.model.score.weight        [n_labels, hidden_size]
    base_model.model.score.bias          [n_labels], where the class has one

transformers calls the module ``score`` or ``classifier``; ``modules_to_save`` may name another. In
an encoder the saved module may have layers before the labels, as RoBERTa's ``classifier.dense``:
``classifier.out_proj`` is the head then, and the others are modules of the base.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.families.contract import ReadContext
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import module_names
from loraplex_adapter_store.plan import Activation, HeadPlan, HeadTask

_KEY = re.compile(
    r"(?:(?:base_model|model|module|_orig_mod|_fsdp_wrapped_module)\.)*"
    r"(?P<module>\w+)(?:\.(?P<copy>modules_to_save|original_module))?(?:\.default)?"
    r"(?P<inner>\.out_proj)?\.(?P<part>weight|bias)"
)
_USUAL = ("score", "classifier")
_CLASSES = {
    "ForSequenceClassification": HeadTask.SEQ_CLS,
    "ForTokenClassification": HeadTask.TOKEN_CLS,
    "ForImageClassification": HeadTask.SEQ_CLS,
}
_PROBLEMS = {
    "regression": Activation.NONE,
    "single_label_classification": Activation.SOFTMAX,
    "multi_label_classification": Activation.SIGMOID,
}
_ACTIVATIONS = {"Identity": Activation.NONE, "Sigmoid": Activation.SIGMOID}


class _Head(NamedTuple):
    module: str
    parts: Mapping[str, str]  # "weight" and "bias" → key
    copies: tuple[str, ...]  # keys that repeat a part


def read_head(context: ReadContext, model_config: Mapping[str, object]) -> HeadPlan | None:
    """Claim the head's tensors; None for an adapter that generates text. Raises AdapterRefused.

    ``model_config``: transformers' config.json beside the adapter, for labels and activation.
    """
    task = _task(context.config)
    if task is None:
        return None
    stored = _find(context)
    n_features = context.base.feature_size or context.base.hidden_size
    weight = context.ledger.take(stored.parts["weight"], (None, n_features))
    n_labels = int(weight.shape[0])
    bias = None
    if "bias" in stored.parts:
        bias = context.ledger.take(stored.parts["bias"], (n_labels,))
    for key in stored.copies:
        context.ledger.claim(key)
    labels = _labels(context.config.get("id2label"), model_config, n_labels)
    head = HeadPlan(
        task=task,
        weight=weight,
        bias=bias,
        labels=labels,
        activation=_activation(model_config, n_labels),
    )
    shown = ", ".join(labels[:20]) + (", …" if n_labels > 20 else "")
    context.notes.append(f"{stored.module}: the head of a {task.value}; {n_labels} labels: {shown}")
    return head


def head_of_base(
    task: HeadTask, weight: Tensor, bias: Tensor | None, model_config: Mapping[str, object]
) -> HeadPlan:
    """Return the head of a base that is a classifier itself. Raises AdapterRefused.

    ``weight`` [n_labels, n_features]. ``model_config``: the fields of its config.json.
    """
    n_labels = int(weight.shape[0])
    return HeadPlan(
        task=task,
        weight=weight,
        bias=bias,
        labels=_labels(None, model_config, n_labels),
        activation=_activation(model_config, n_labels),
    )


def _task(config: AdapterConfig) -> HeadTask | None:
    named = config.text("task_type")
    if named is not None:
        return next((task for task in HeadTask if task.value == named.upper()), None)
    trained = config.get("auto_mapping")
    name = trained.get("base_model_class") if isinstance(trained, dict) else None
    suffixes = [suffix for suffix in _CLASSES if isinstance(name, str) and name.endswith(suffix)]
    return _CLASSES[suffixes[0]] if suffixes else None


def _find(context: ReadContext) -> _Head:
    saved = context.config.name_list("modules_to_save")
    names = {*_USUAL, *saved} - {name.rpartition(".")[2] for name in module_names(context.base)}
    parts: dict[str, dict[str, str]] = {}
    copies: list[str] = []
    foreign: list[str] = []  # heads of other architectures
    for key in context.ledger.unclaimed:
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in names:
            continue
        module = f"{match['module']}{match['inner'] or ''}"
        if match["inner"] and module != context.base.classifier:
            foreign.append(module)
            continue
        twin = key.replace(".modules_to_save.", ".").replace(".default.", ".")
        if match["copy"] == "original_module":  # its state before training
            copies.append(key)
        elif match["copy"] and twin != key and twin in context.ledger.names:
            if context.ledger.raw(key) != context.ledger.raw(twin):
                raise AdapterMismatch(f"{key} and {twin} differ")
            copies.append(key)
        else:
            parts.setdefault(module, {})[match["part"]] = key
    if len(parts) > 1:
        raise AdapterMismatch(f"the file has {len(parts)} heads: {', '.join(sorted(parts))}")
    module, of_module = next(iter(parts.items()), ("score", {}))
    if "weight" not in of_module and foreign:
        raise AdapterMismatch(
            f"the file's classifier is {foreign[0]}, and a head of that form is served on the "
            "architecture that it was trained on alone",
            missing_keys=(f"{module}.weight",),
        )
    if "weight" not in of_module:
        raise AdapterMismatch(
            f"task_type is {context.config.text('task_type')}, but the file has no classifier "
            f"({' or '.join(sorted(names))}); name it in modules_to_save when training",
            missing_keys=(f"{module}.weight",),
        )
    return _Head(module, of_module, tuple(copies))


def _labels(own: object, model_config: Mapping[str, object], n_labels: int) -> tuple[str, ...]:
    """Return ``own`` id2label, else that of config.json, else the default names."""
    named = own or model_config.get("id2label")
    if named is None:
        return tuple(f"LABEL_{index}" for index in range(n_labels))
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise MalformedFile(f"id2label is {str(named)[:80]}, an object of names is needed")
    if set(named) != {str(index) for index in range(n_labels)}:
        raise AdapterMismatch(
            f"id2label names {len(named)} labels, the head has {n_labels}, numbered from 0"
        )
    return tuple(str(named[str(index)]) for index in range(n_labels))


def _activation(model_config: Mapping[str, object], n_labels: int) -> Activation:
    """Choose as transformers' pipelines and sentence-transformers' CrossEncoder do."""
    ours = model_config.get("sentence_transformers")
    named = ours.get("activation_fn") if isinstance(ours, dict) else None
    if named is not None:
        kind = str(named).rpartition(".")[2]
        if kind not in _ACTIVATIONS:
            raise UnsupportedAdapter(
                f"config.json: activation_fn is {named!r}; served are {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[kind]
    problem = model_config.get("problem_type")
    if problem is not None:
        if problem not in _PROBLEMS:
            raise UnsupportedAdapter(
                f"config.json: problem_type is {problem!r}; known: {', '.join(_PROBLEMS)}"
            )
        return _PROBLEMS[str(problem)]
    return Activation.SIGMOID if n_labels == 1 else Activation.SOFTMAX
