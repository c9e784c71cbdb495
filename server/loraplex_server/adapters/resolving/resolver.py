"""Resolves the adapter of a request. Nothing else reads ``model`` and ``adapter``."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from loraplex_adapter_store.errors import (
    CatalogueUnavailable,
    StoreError,
    UnknownAdapter,
    UnservableAdapter,
)
from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.selector import (
    Auto,
    Description,
    Library,
    Mixture,
    MixturePart,
    NameRef,
    Selector,
    parse_selector,
)
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.worker_pools import WorkerPools, leased
from loraplex_server.errors import ApiError, from_store, invalid, not_found
from loraplex_server.settings.api_keys import EVERY_ADAPTER, GENERATED, AdapterAccess

from .access import check_allowed, follow_names, stored_name
from .described_adapters import DescribedAdapters
from .resolved_adapter import AdapterRequest, ResolvedAdapter
from .semantic_router import SemanticRouter

_MAX_NAMES_SHOWN = 20
_BASE = "base"  # reserved by the store, so no adapter has this name


class AdapterResolver:
    """Resolves the adapters of requests. Event loop only; ``pools`` run the blocking calls."""

    def __init__(
        self,
        store: AdapterStore,
        base_names: Sequence[str],
        pools: WorkerPools,
        router: SemanticRouter | None = None,
        descriptions: DescribedAdapters | None = None,
        encoder_name: str | None = None,
        refused_folders: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``base_names``: names of the base model, besides ``base``. ``encoder_name`` is listed.
        ``refused_folders``: names whose folders are not served, and why.

        Without ``router`` or ``descriptions``, ``auto`` or descriptions are refused.
        """
        self._store = store
        self._base_names = tuple(base_names)
        self._means_base = frozenset({*base_names, _BASE})
        self._pools = pools
        self._router, self._descriptions = router, descriptions
        self._refused_folders = refused_folders
        self._encoder_names = () if encoder_name is None else (encoder_name,)

    @property
    def base_name(self) -> str:
        return self._base_names[0]

    @property
    def base_names(self) -> tuple[str, ...]:
        return self._base_names

    def parse(
        self,
        *,
        model: str | None,
        adapter: object = None,
        adapter_id: str | None = None,
        lora_path: str | None = None,
    ) -> AdapterRequest:
        """Parse the fields that name an adapter. Raises ApiError (400, 404)."""
        named: list[tuple[str, Selector | None]] = []
        if model and model not in self._means_base:
            try:
                named.append(("model", self._selector_of_model(model)))
            except StoreError:
                return AdapterRequest(None, "model", model, is_unknown=True)
        if adapter is not None:
            named.append(("adapter", self._selector_of(adapter, "adapter")))
        for param, name in (("adapter_id", adapter_id), ("lora_path", lora_path)):
            if name:
                named.append((param, self._selector_of(name, param)))
        if len({selector for _, selector in named}) > 1:
            first, second = named[0][0], named[-1][0]
            raise invalid(f"{first!r} and {second!r} name different adapters", second)
        param, selector = named[0] if named else ("model", None)
        if selector is None:
            return AdapterRequest(None, param, model or self.base_name)
        if param == "model":
            return AdapterRequest(selector, param, str(model))
        return AdapterRequest(selector, param, f"{self.base_name}:{_label(selector)}")

    async def resolve(
        self,
        request: AdapterRequest,
        text: str = "",
        access: AdapterAccess = EVERY_ADAPTER,
        *,
        with_tools: bool = False,
        takes_few_shot: bool = False,
    ) -> ResolvedAdapter:
        """Return the adapter with a lease; may wait for its load. Raises ApiError.

        ``auto`` reads ``text`` and ``with_tools`` (the request offers tools). With
        ``takes_few_shot``, the caller puts the result's examples before its chat.
        """
        selector = request.selector
        if request.is_unknown:
            raise await self._no_such_model(request.model, access)
        if selector is None:
            return ResolvedAdapter()
        for name in _names(selector):
            check_allowed(access, name, param=request.param)
        try:
            if isinstance(selector, Auto):
                return await self._choose(selector, text, access, request.param, with_tools)
            if isinstance(selector, Description):
                return await self._describe(selector, access, request.param, takes_few_shot)
            await self._follow(selector, access)
            stored = self._in_store(selector, access, request.param)
            lease = await self._acquire(stored, access)
        except StoreError as error:
            raise await self._explain(error, request, access) from error
        return ResolvedAdapter(lease, _label(selector))

    async def what_exists(self, access: AdapterAccess) -> str:
        """Return a list of the adapters, for messages about a name that does not exist."""
        cards = await self._pools.reads.run(access.tenant, self._store.cards.all)
        names = [access.shown(card.name) for card in access.listed(cards)]
        shown = ", ".join([self.base_name, *self._encoder_names, *names[:_MAX_NAMES_SHOWN]])
        more = len(names) - _MAX_NAMES_SHOWN
        return f"available: {shown}" + (f" and {more} more adapters" if more > 0 else "")

    async def _follow(self, selector: NameRef | Mixture | Library, access: AdapterAccess) -> None:
        """Read stale names from the catalogue. Raises CatalogueUnavailable for an unknown name."""
        names = _names(selector)
        try:
            await follow_names(self._store, self._pools.catalogue, access, names)
        except CatalogueUnavailable:
            is_exact = isinstance(selector, NameRef) and selector.digest_prefix is not None
            if not (is_exact and self._store.has_name(access.own(names[0]))):
                raise

    def _in_store(
        self, selector: NameRef | Mixture | Library, access: AdapterAccess, param: str
    ) -> NameRef | Mixture | Library:
        """Return ``selector`` with the stored names. Raises ApiError (403)."""

        def find(ref: NameRef) -> NameRef:
            return replace(ref, name=stored_name(self._store, access, ref.name, param=param))

        match selector:
            case NameRef():
                return find(selector)
            case Mixture(parts):
                return Mixture(tuple(MixturePart(find(part.ref), part.weight) for part in parts))
            case Library():
                return replace(selector, refs=tuple(find(ref) for ref in selector.refs))

    async def _choose(
        self, selector: Auto, text: str, access: AdapterAccess, param: str, with_tools: bool
    ) -> ResolvedAdapter:
        """Return the adapter that ``auto`` chooses."""
        if self._router is None:
            raise _not_enabled("semantic routing", param)
        relist = False
        while True:
            decision = await self._router.choose(
                text,
                access.candidates,
                tenant=access.tenant,
                with_tools=with_tools,
                relist=relist,
            )
            explanation = {"method": "auto", **decision.to_json(access.shown)}
            if decision.adapter is None:
                return ResolvedAdapter(explanation=explanation)
            try:
                lease = await self._acquire(NameRef(decision.adapter), access)
            except (UnknownAdapter, UnservableAdapter):
                if relist:
                    raise
                relist = True  # the adapter was deleted after adapters were listed: choose again
                continue
            return ResolvedAdapter(lease, access.shown(decision.adapter), explanation)

    async def _describe(
        self, selector: Description, access: AdapterAccess, param: str, takes_few_shot: bool
    ) -> ResolvedAdapter:
        """Return the adapter for a description."""
        if self._descriptions is None:
            raise _not_enabled("adapter generation", param)
        resolution = await self._descriptions.resolve(
            selector, access, takes_few_shot=takes_few_shot
        )
        if resolution.adapter is None:
            return ResolvedAdapter(
                explanation=resolution.explanation,
                few_shot=resolution.few_shot,
                system_prompt=resolution.system_prompt,
            )
        lease = await self._acquire(resolution.adapter, access)
        label = access.shown(resolution.adapter.name)
        return ResolvedAdapter(lease, label, resolution.explanation, resolution.few_shot)

    async def _acquire(
        self, selector: NameRef | Mixture | Library, access: AdapterAccess
    ) -> AdapterLease:
        tenant = access.tenant or ""
        if isinstance(selector, NameRef):
            # A resident or unknown adapter must not wait for a thread behind adapters that load.
            resident = self._store.leases.acquire_resident(selector, tenant=tenant)
            if resident is not None:
                return resident
            asks = not self._store.is_fresh(selector.name)
            reads = self._pools.catalogue if asks else self._pools.reads
            check = functools.partial(self._store.leases.check_known, selector)
            await reads.run(access.tenant, check)
        acquire = functools.partial(self._store.acquire, selector, tenant=tenant)
        return await leased(self._pools.loads, tenant, acquire)

    def _selector_of(self, value: object, param: str) -> Selector | None:
        """Return None for a name of the base."""
        if isinstance(value, str) and value in self._means_base:
            return None
        return _parse(value, param)

    def _selector_of_model(self, model: str) -> Selector:
        """Return the selector of the field ``model``. Raises StoreError."""
        for base in self._means_base:
            if model.startswith(f"{base}:"):
                return parse_selector(model[len(base) + 1 :])
        return parse_selector(model)

    async def _no_such_model(self, model: str, access: AdapterAccess) -> ApiError:
        exists = await self.what_exists(access)
        return not_found(
            f"model {model[:128]!r} does not exist; {exists}", "model", "model_not_found"
        )

    async def _explain(
        self, error: StoreError, request: AdapterRequest, access: AdapterAccess
    ) -> ApiError:
        answer = from_store(error, param=request.param, access=access)
        if answer.status == 404:
            names = _names(request.selector) if request.selector is not None else ()
            for name in names if access.sees_all else ():
                if name in self._refused_folders:
                    answer.message += f"; its folder is refused: {self._refused_folders[name]}"
            answer.message = f"{answer.message}; {await self.what_exists(access)}"
            if request.param == "model":
                answer.code = "model_not_found"
        return answer


def _not_enabled(feature: str, param: str) -> ApiError:
    message = f"{feature} is not enabled on this server; name an adapter instead"
    return invalid(message, param, "feature_not_enabled")


def _parse(value: object, param: str) -> Selector:
    try:
        return parse_selector(value)
    except StoreError as error:
        raise from_store(error, param=param) from error


def _names(selector: Selector) -> Sequence[str]:
    """Return the names that need permission. A description needs the generated ones."""
    match selector:
        case Auto():
            return ()
        case Description():
            return (GENERATED,)
        case Mixture():
            return [part.ref.name for part in selector.parts]
        case Library():
            return [ref.name for ref in selector.refs]
        case NameRef():
            return (selector.name,)


def _label(selector: Selector) -> str:
    """Return a label that is safe in a header: ASCII names, and never the description itself."""
    match selector:
        case Auto():
            return "auto"
        case Description():
            return "generated"
        case Mixture() | Library():
            return str(selector).replace(" ", "")
        case NameRef():
            return selector.name
