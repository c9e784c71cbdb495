"""Reads config and checked tensors into a plan and its report."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import AdapterMismatch, BaseMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.beside_linears.heads import read_head
from loraplex_adapter_store.families.contract import FamilyReader, Fold, ReadContext
from loraplex_adapter_store.families.table import FAMILIES, UNSUPPORTED
from loraplex_adapter_store.files.adapter_config import AdapterConfig, check_fields
from loraplex_adapter_store.files.companion_files import read_model_config, read_pooling
from loraplex_adapter_store.files.digest import digest_of
from loraplex_adapter_store.files.ledger import TensorLedger
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import AdapterPlan, ModulePlan
from loraplex_adapter_store.report import LoadReport, ModuleReport

from .checks import check_effect, check_fold
from .residual import check_residual
from .spectrum import delta_ratio

# Linears that the engine packs with others of the same input.
_SHARE_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


class Reading(NamedTuple):
    plan: AdapterPlan
    report: LoadReport


def read_adapter(
    config: AdapterConfig,
    tensors: SafetensorsFile,
    base: BaseSpec,
    limits: StoreLimits,
    *,
    chat_template: str | None = None,
    companions: Mapping[str, bytes] = MappingProxyType({}),
    tenant: str = "",
) -> Reading:
    """Check and fold an adapter. Raises AdapterRefused.

    ``companions``: the files of ``companion_files`` that the adapter has, by name.
    """
    context = ReadContext(config, TensorLedger(tensors), base, limits)
    try:
        fold, ratios = _fold(context, tensors, companions)
    except AdapterMismatch as error:
        if (other := _other_base(context)) is not None:
            error.args = (f"{other}, and the adapter does not fit: {error}",)
        raise
    head = fold.plan.head
    pooling = None if head is not None else read_pooling(companions, limits)
    plan = replace(
        fold.plan,
        digest=digest_of(config.values, tensors, chat_template, head, pooling, tenant),
        pooling=pooling,
        chat_template=chat_template,
        n_bytes=_n_bytes(fold.plan),
    )
    return Reading(plan, _report_of(context, fold, plan, ratios, tensors.n_bytes))


def _fold(
    context: ReadContext, tensors: SafetensorsFile, companions: Mapping[str, bytes]
) -> tuple[Fold, Mapping[str, float | None]]:
    """Return the checked fold, and ‖ΔW‖/‖W‖ of each module."""
    reader, ledger = _reader_of(context.config), context.ledger
    _check_base(context, tensors.metadata)
    head = read_head(context, read_model_config(companions, context.limits))
    fold = reader(context)
    fold = fold._replace(plan=replace(fold.plan, head=head))
    if ledger.unclaimed:
        raise AdapterMismatch(
            f"{len(ledger.unclaimed)} of {len(ledger.names)} tensors match nothing in this base",
            [f"{name} {list(ledger.shape(name))}" for name in ledger.unclaimed],
            unexpected_keys=ledger.unclaimed,
        )
    check_fields(context.config)
    check_fold(fold.plan, context.base, context.limits)
    check_effect(fold.plan, context.base)
    base = context.base
    ratios = {name: delta_ratio(base, name, plan) for name, plan in fold.plan.modules.items()}
    if context.config.get("base_residual") is not False:
        check_residual(fold.plan, base, ratios)
    return fold, ratios


def _reader_of(config: AdapterConfig) -> FamilyReader:
    kind = config.peft_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in UNSUPPORTED:
        raise UnsupportedAdapter(f"peft_type {kind} cannot be served: {UNSUPPORTED[kind]}")
    raise UnsupportedAdapter(
        f"peft_type {kind} is not known; readable: {', '.join(sorted(FAMILIES))}"
    )


def _check_base(context: ReadContext, metadata: Mapping[str, str]) -> None:
    config, base = context.config, context.base
    wanted = config.text("loraplex_base_fingerprint") or metadata.get("loraplex_base_fingerprint")
    if wanted is not None and wanted != base.fingerprint:
        raise BaseMismatch(
            f"trained on the base with fingerprint {wanted[:16]}…, this one is "
            f"{base.model_id} with {base.fingerprint[:16]}…"
        )
    other = _other_base(context)
    if wanted is None and other is not None:
        if context.limits.refuse_other_base:
            raise BaseMismatch(f"{other}; --refuse-other-base is set")
        context.warnings.append(f"{other}; every shape fits")


def _other_base(context: ReadContext) -> str | None:
    """Name both bases if the config was written for another one."""
    declared = context.config.text("base_model_name_or_path")
    if not declared or _leaf(declared) == _leaf(context.base.model_id):
        return None
    return f"config names the base {declared!r}, this server runs {context.base.model_id!r}"


def _leaf(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _n_bytes(plan: AdapterPlan) -> int:
    """Return the bytes of all tensors. Views of one storage (shared bases) count once."""
    storages = [tensor.untyped_storage() for tensor in plan.tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _report_of(
    context: ReadContext,
    fold: Fold,
    plan: AdapterPlan,
    ratios: Mapping[str, float | None],
    n_bytes: int,
) -> LoadReport:
    modules = {
        name: ModuleReport(module.rank, ratios[name])
        for name, module in sorted(plan.modules.items())
    }
    n_slow = sum(_runs_in_torch(name, module) for name, module in plan.modules.items())
    if n_slow:
        context.notes.append(
            f"{n_slow} modules are applied to the adapter's own rows in torch, module by module: "
            "such rows take longer than rows of a LoRA"
        )
    return LoadReport(
        family=plan.family.value,
        digest=plan.digest,
        scale_rule=fold.scale_rule,
        matched=context.ledger.claimed,
        unexpected_keys=(),
        modules=modules,
        notes=tuple(context.notes),
        warnings=tuple(context.warnings),
        n_bytes_file=n_bytes,
        n_bytes_plan=plan.n_bytes,
        kept_energy=fold.kept_energy,
        base_declared=context.config.text("base_model_name_or_path"),
    )


def _runs_in_torch(name: str, module: ModulePlan) -> bool:
    """Return True if the engine computes the linear once more for the adapter's own rows."""
    is_own_input = module.in_scale is not None and name.rpartition(".")[2] in _SHARE_INPUTS
    return is_own_input or bool(module.operators) or module.shared is not None
