"""Which adapter a request means: the one place where ``model`` and ``adapter`` are read."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from loraplex_adapter_store.errors import (
    CatalogueUnavailable,
    StoreError,
    UnknownAdapter,
    UnservableAdapter,
)
from loraplex_adapter_store.plan import HeadPlan, HeadTask
from loraplex_adapter_store.selector import (
    Auto,
    Description,
    Library,
    Mixture,
    MixturePart,
    NameRef,
    Selector,
    parse_selector,
)
from loraplex_adapter_store.store import AdapterLease, AdapterStore
from loraplex_server.api.errors import ApiError, from_store, invalid, not_found
from loraplex_server.api_keys import EVERY_ADAPTER, GENERATED, AdapterAccess
from loraplex_server.metrics.call_log import ChosenBy

from .access import check_allowed, follow_names, stored_name
from .worker_pools import WorkerPools

__all__ = [
    "AdapterRequest",
    "AdapterResolver",
    "Resolution",
    "ResolvedAdapter",
    "SelectorResolver",
    "Turns",
]

_MAX_NAMES_SHOWN = 20
_BASE = "base"  # reserved by the store, so no adapter has this name


Turns = Sequence[tuple[str, str]]
"""Prompts and their answers, which go before a chat's own turns: examples of what is asked."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a resolver chose, and why, for people to read."""

    selector: NameRef | Mixture | None  # None: the base model answers best
    explanation: Mapping[str, object] = field(default_factory=dict)  # JSON-ready
    turns: Turns = ()


class SelectorResolver(Protocol):
    """Finds the adapter for ``auto`` (semantic routing) and for a description (generation)."""

    async def resolve(
        self,
        selector: Auto | Description,
        text: str,
        access: AdapterAccess,
        *,
        with_tools: bool = False,
        takes_turns: bool = False,
        relist: bool = False,
    ) -> Resolution:
        """For ``auto``: what the user said, whether there are tools to call, and whether a listing
        of the adapters that is kept for a while will not do. ``takes_turns``: whether examples may
        come back as turns. Raises StoreError or ApiError.

        Runs on the event loop: slow work belongs in a thread.
        """


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """A parsed request for an adapter; ``selector`` None means the base model."""

    selector: Selector | None
    param: str  # the field that named it, for errors
    model: str  # what the answer's ``model`` says
    is_unknown: bool = False  # the model's name cannot even be an adapter's


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """The resolved adapter with its lease. Its owner calls ``release`` exactly once."""

    lease: AdapterLease | None = None
    label: str | None = None  # name as asked for, for the answer, logs and metrics
    explanation: Mapping[str, object] | None = None
    turns: Turns = ()  # only for who takes them

    def release(self) -> None:
        if self.lease is not None:
            self.lease.release()

    @property
    def head(self) -> HeadPlan | None:
        """Of a classifier; None: it generates text."""
        return None if self.lease is None else self.lease.plan.head

    def check_generates(self, param: str) -> None:
        """Raises ApiError (400) for a classifier: its weights were never trained to write."""
        if self.head is not None:
            routes = {
                HeadTask.SEQ_CLS: "/classify, /score, /rerank or /pooling",
                HeadTask.TOKEN_CLS: "/pooling",
            }
            raise invalid(
                f"adapter {self.label!r} is a classifier ({self.head.task.value}) and writes no "
                f"text; ask {routes[self.head.task]}",
                param,
                "adapter_is_classifier",
            )

    @property
    def header(self) -> str:
        """The value of x-loraplex-adapter: ``name@digest``, or ``base``."""
        return "base" if self.lease is None else f"{self.label}@{self.lease.digest[:12]}"

    @property
    def metrics_label(self) -> str:
        """A name of bounded variety: the weights of a mixture are the client's."""
        if self.lease is None or self.label is None:
            return "base"
        return "mixture" if self.lease.revision == 0 else self.lease.name

    @property
    def chosen_by(self) -> ChosenBy:
        if self.explanation is not None:
            return "auto" if self.explanation.get("method") == "auto" else "description"
        if self.lease is None:
            return "base"
        return "mixture" if self.lease.revision == 0 else "name"

    @property
    def routing(self) -> Mapping[str, object] | None:
        """What ``auto`` weighed; None if the adapter was not chosen by it."""
        explained = self.explanation
        return explained if explained is not None and explained.get("method") == "auto" else None

    def to_json(self, n_turns: int = 0) -> dict[str, object] | None:
        """None for a plain answer of the base. ``n_turns``: how many of ``turns`` were sent."""
        if self.lease is None and self.explanation is None:
            return None
        digest = None if self.lease is None else self.lease.digest
        chosen: dict[str, object] = {"name": self.label, "digest": digest}
        if self.explanation is not None:
            sent = {"turns": n_turns} if self.turns else {}
            chosen["chosen_by"] = {**self.explanation, **sent}
        return chosen


class AdapterResolver:
    """Event loop only: the store's blocking calls run in ``pools``."""

    def __init__(
        self,
        store: AdapterStore,
        base_names: Sequence[str],
        pools: WorkerPools,
        resolver: SelectorResolver | None = None,
    ) -> None:
        """``base_names``: how the base model is listed; it may always be called ``base`` too."""
        self._store = store
        self._base_names = tuple(base_names)
        self._means_base = frozenset({*base_names, _BASE})
        self._pools = pools
        self._resolver = resolver

    @property
    def base_name(self) -> str:
        return self._base_names[0]

    @property
    def base_names(self) -> tuple[str, ...]:
        return self._base_names

    def parse(
        self, *, model: str | None, adapter: object = None, adapter_id: str | None = None
    ) -> AdapterRequest:
        """Parses ``model``, ``adapter`` and LoRAX's ``adapter_id``. Raises ApiError (400, 404)."""
        named: list[tuple[str, Selector | None]] = []
        if model and model not in self._means_base:
            try:
                named.append(("model", self._selector_of_model(model)))
            except StoreError:
                return AdapterRequest(None, "model", model, is_unknown=True)
        if adapter is not None:
            named.append(("adapter", self._selector_of(adapter, "adapter")))
        if adapter_id:
            named.append(("adapter_id", self._selector_of(adapter_id, "adapter_id")))
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
        takes_turns: bool = False,
    ) -> ResolvedAdapter:
        """Takes the lease; may wait for a load. Raises ApiError.

        ``text`` and ``with_tools`` (the request offers tools) serve ``auto``. ``takes_turns``: the
        caller puts the result's ``turns`` before its chat.
        """
        selector = request.selector
        if request.is_unknown:
            raise await self._no_such_model(request.model, access)
        if selector is None:
            return ResolvedAdapter()
        for name in _names(selector):
            check_allowed(access, name, param=request.param)
        try:
            if isinstance(selector, Auto | Description):
                resolver = self._resolver_of(selector, request.param)
                return await self._choose(
                    resolver,
                    selector,
                    text,
                    access,
                    with_tools=with_tools,
                    takes_turns=takes_turns,
                )
            await self._follow(selector, access)
            stored = self._in_store(selector, access, request.param)
            lease = await self._acquire(stored, access)
        except StoreError as error:
            raise await self._explain(error, request, access) from error
        return ResolvedAdapter(lease, _label(selector))

    async def what_exists(self, access: AdapterAccess) -> str:
        """For people who asked for something that does not."""
        loop = asyncio.get_running_loop()
        cards = await loop.run_in_executor(self._pools.reads, self._store.seen)
        names = [access.shown(card.name) for card in access.listed(cards)]
        shown = ", ".join([self.base_name, *names[:_MAX_NAMES_SHOWN]])
        more = len(names) - _MAX_NAMES_SHOWN
        return f"available: {shown}" + (f" and {more} more adapters" if more > 0 else "")

    async def _follow(self, selector: NameRef | Mixture | Library, access: AdapterAccess) -> None:
        """Before ``_in_store``. Raises CatalogueUnavailable for a name that nothing is known of."""
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
        """``selector`` with the store's names. Raises ApiError (403)."""

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
        self,
        resolver: SelectorResolver,
        selector: Auto | Description,
        text: str,
        access: AdapterAccess,
        *,
        with_tools: bool,
        takes_turns: bool,
    ) -> ResolvedAdapter:
        """What ``resolver`` chooses, with its lease. ``auto`` may choose a second time."""
        relist = False
        while True:
            chosen = await resolver.resolve(
                selector,
                text,
                access,
                with_tools=with_tools,
                takes_turns=takes_turns,
                relist=relist,
            )
            if chosen.selector is None:
                return ResolvedAdapter(explanation=chosen.explanation, turns=chosen.turns)
            try:
                lease = await self._acquire(chosen.selector, access)
            except (UnknownAdapter, UnservableAdapter):
                if relist or isinstance(selector, Description):
                    raise
                relist = True  # deleted since adapters were listed, or found unservable just now
                continue
            label = access.shown(_label(chosen.selector))
            return ResolvedAdapter(lease, label, chosen.explanation, chosen.turns)

    async def _acquire(
        self, selector: NameRef | Mixture | Library, access: AdapterAccess
    ) -> AdapterLease:
        loop = asyncio.get_running_loop()
        if isinstance(selector, NameRef):
            # What is in memory, or nowhere, must not wait for threads behind what has to be loaded.
            resident = self._store.acquire_resident(selector)
            if resident is not None:
                return resident
            asks = not self._store.is_fresh(selector.name)
            reads = self._pools.catalogue if asks else self._pools.reads
            await loop.run_in_executor(reads, self._store.check_known, selector)
        tenant = access.tenant or ""
        acquire = functools.partial(self._store.acquire, selector, tenant=tenant)
        return await self._pools.loads.lease(tenant, acquire)

    def _resolver_of(self, selector: Auto | Description, param: str) -> SelectorResolver:
        if self._resolver is None:
            feature = "semantic routing" if isinstance(selector, Auto) else "adapter generation"
            raise invalid(
                f"{feature} is not enabled on this server; name an adapter instead",
                param,
                "feature_not_enabled",
            )
        return self._resolver

    def _selector_of(self, value: object, param: str) -> Selector | None:
        """None where the base is asked for by name."""
        if isinstance(value, str) and value in self._means_base:
            return None
        return _parse(value, param)

    def _selector_of_model(self, model: str) -> Selector:
        """Raises StoreError."""
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
        told = from_store(error, param=request.param, access=access)
        if told.status == 404:
            told.message = f"{told.message}; {await self.what_exists(access)}"
            if request.param == "model":
                told.code = "model_not_found"
        return told


def _parse(value: object, param: str) -> Selector:
    try:
        return parse_selector(value)
    except StoreError as error:
        raise from_store(error, param=param) from error


def _names(selector: Selector) -> Sequence[str]:
    """What ``selector`` uses for certain: ``auto`` may yet choose, a description names a folder."""
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
    """Header-safe: the names of adapters are ASCII, a description is not repeated."""
    match selector:
        case Auto():
            return "auto"
        case Description():
            return "generated"
        case Mixture() | Library():
            return str(selector).replace(" ", "")
        case NameRef():
            return selector.name
