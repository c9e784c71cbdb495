"""Config and tensors must tell one story: every target has its tensors, and nothing else has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.targets import expand_targets

from .contract import ReadContext

__all__ = ["check_coverage", "require_parts"]


def check_coverage(context: ReadContext, found: Iterable[str]) -> None:
    """Compares the modules that have tensors with those the config targets.

    Raises AdapterMismatch that names targets without tensors and tensors without target: an adapter
    of which only a part would work is refused.
    """
    targets = expand_targets(context.config, context.base)
    present = frozenset(found)
    missing, extra = sorted(targets - present), sorted(present - targets)
    if not targets and not present:
        raise AdapterMismatch(
            "no module of the base matches target_modules "
            f"{context.config.values.get('target_modules')!r}: the adapter would do nothing",
            _unmatched(context),
            unexpected_keys=context.ledger.unclaimed,
        )
    if missing or extra:
        problems = [f"{name}: targeted by the config, has no tensors" for name in missing]
        problems += [f"{name}: has tensors, is not targeted by the config" for name in extra]
        raise AdapterMismatch(
            f"config and tensors disagree on {len(problems)} of {len(targets | present)} modules",
            [*problems, *_unmatched(context)],
            unexpected_keys=context.ledger.unclaimed,
            missing=missing,
        )


def require_parts(module: str, parts: Mapping[str, str], needed: Iterable[str]) -> None:
    """Raises AdapterMismatch if ``module`` lacks one of the tensors that its method needs."""
    missing = [f"{module}.{suffix}" for suffix in needed if suffix not in parts]
    if missing:
        raise AdapterMismatch(
            f"{module} is incomplete: it lacks {', '.join(missing)}", missing, missing=missing
        )


def _unmatched(context: ReadContext) -> list[str]:
    names = context.ledger.unclaimed
    return [f"{name}: tensor in the file" for name in names[:3]]
