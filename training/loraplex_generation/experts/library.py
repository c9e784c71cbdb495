"""The experts among the adapters of a store."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.name_syntax import tenant_of
from loraplex_adapter_store.stored_adapters import StoredAdapter
from loraplex_generation.errors import UnfitExpert

from .expert import Expert, Form
from .icm_lora import MAX_PROMPTS


class Library(NamedTuple):
    experts: list[Expert]  # of one form, sorted by name
    base_fingerprint: str
    n_bytes: int  # of the experts' files
    left_out: list[str]  # a sentence for each other adapter


def library_of(adapters: Sequence[StoredAdapter]) -> Library:
    """Return the largest group of described plain LoRAs of one base, rank and target set.

    Adapters of tenants and adapters with an expiry are left out: the file of a fit is for everybody
    and for good. Raises UnfitExpert if there are none.
    """
    groups: dict[tuple[str, Form], list[tuple[Expert, StoredAdapter]]] = defaultdict(list)
    left_out: list[str] = []
    for adapter in adapters:
        name, description = adapter.record.name, adapter.record.description
        if tenant_of(name) or adapter.record.expires is not None:
            continue
        if not description:
            left_out.append(f"adapter {name!r} has no description")
            continue
        try:
            prompts = adapter.record.examples[:MAX_PROMPTS]
            expert = Expert.of_plan(name, description, adapter.read(), prompts)
        except StoreError as error:
            left_out.append(str(error))
            continue
        groups[adapter.content.base_fingerprint, expert.form].append((expert, adapter))
    if not groups:
        why = "; ".join(left_out) or "there are no adapters"
        raise UnfitExpert(f"no adapter can be an expert: {why}")
    (base, form), members = max(groups.items(), key=lambda group: len(group[1]))
    for (_, other), others in groups.items():
        left_out += [
            f"adapter {expert.name!r} has rank {other[0][2]} on {len(other)} modules, the others "
            f"have rank {form[0][2]} on {len(form)}"
            for expert, _ in others
            if others is not members
        ]
    n_bytes = sum(adapter.content.disk_bytes for _, adapter in members)
    return Library([expert for expert, _ in members], base, n_bytes, left_out)
