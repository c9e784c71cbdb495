"""From config and checked tensors to a plan and its report: the one way into the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from loraplex_adapter_store.families.config_fields import check_fields
from loraplex_adapter_store.families.contract import FamilyReader, Fold, ReadContext
from loraplex_adapter_store.families.heads import read_head
from loraplex_adapter_store.families.table import FAMILIES, UNSUPPORTED

from .adapter_config import AdapterConfig
from .base_spec import BaseSpec
from .companion_files import read_model_config, read_pooling
from .digest import digest_of
from .effect import check_effect
from .errors import AdapterMismatch, BaseMismatch, UnsupportedAdapter
from .fold_check import check_fold
from .ledger import TensorLedger
from .limits import StoreLimits
from .plan import AdapterPlan, PoolingPlan
from .report import LoadReport, ModuleReport
from .row_cost import row_cost_note
from .safetensors_reader import SafetensorsFile
from .spectrum import delta_ratio

__all__ = ["Reading", "read_adapter"]


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
    """Recognises, checks, folds and reports. Raises AdapterRefused.

    ``companions``: those of ``companion_files`` that there are, by name.
    """
    context = ReadContext(config, TensorLedger(tensors), base, limits)
    fold = _fold(context, tensors, companions)
    pooling = None if fold.head is not None else read_pooling(companions, limits)
    digest = digest_of(config.values, tensors, chat_template, fold.head, pooling, tenant)
    plan = _plan_of(fold, digest, chat_template, pooling)
    return Reading(plan, _report_of(context, fold, plan, tensors.n_bytes))


def _fold(context: ReadContext, tensors: SafetensorsFile, companions: Mapping[str, bytes]) -> Fold:
    reader, ledger = _reader_of(context.config), context.ledger
    _check_base(context, tensors.metadata)
    head = read_head(context, read_model_config(companions, context.limits))
    fold = replace(reader(context), head=head)
    if ledger.unclaimed:
        raise AdapterMismatch(
            f"{len(ledger.unclaimed)} of {len(ledger.names)} tensors match nothing in this base",
            [f"{name} {list(ledger.shape(name))}" for name in ledger.unclaimed],
            unexpected_keys=ledger.unclaimed,
        )
    check_fields(context.config)
    check_fold(fold, context.base, context.limits)
    check_effect(fold, context.base)
    return fold


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
    declared = config.text("base_model_name_or_path")
    if wanted is None and declared and not _same_model(declared, base.model_id):
        message = f"config names the base {declared!r}, this server runs {base.model_id!r}"
        if context.limits.refuse_other_base:
            raise BaseMismatch(message)
        context.warnings.append(f"{message}; every shape fits")


def _same_model(declared: str, model_id: str) -> bool:
    return _leaf(declared) == _leaf(model_id)


def _leaf(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _plan_of(
    fold: Fold, digest: str, chat_template: str | None, pooling: PoolingPlan | None
) -> AdapterPlan:
    def build(n_bytes: int) -> AdapterPlan:
        return AdapterPlan(
            digest=digest,
            family=fold.family,
            modules=fold.modules,
            experts=fold.experts,
            prefix=fold.prefix,
            embedding_rows=fold.embedding_rows,
            head_rows=fold.head_rows,
            replaced_weights=fold.replaced_weights,
            norms=fold.norms,
            stacked=fold.stacked,
            head=fold.head,
            pooling=pooling,
            chat_template=chat_template,
            n_bytes=n_bytes,
        )

    # Views of one storage (shared bases) count once.
    storages = [tensor.untyped_storage() for tensor in build(0).tensors()]
    distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return build(sum(distinct.values()))


def _report_of(context: ReadContext, fold: Fold, plan: AdapterPlan, n_bytes: int) -> LoadReport:
    modules = {
        name: ModuleReport(module.rank, delta_ratio(context.base, name, module))
        for name, module in sorted(plan.modules.items())
    }
    cost = row_cost_note(plan.modules, context.base)
    if cost is not None:
        context.notes.append(cost)
    return LoadReport(
        family=fold.family.value,
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
