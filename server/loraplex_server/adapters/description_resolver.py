"""Answers ``adapter: "auto"`` with the router and descriptions with the generator."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.selector import Auto, Description, NameRef
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters import AdapterProfile, Encoder
from loraplex_server.api.errors import invalid
from loraplex_server.api_keys import AdapterAccess

from .generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from .learning import Learner
from .resolver import Resolution
from .semantic_router import SemanticRouter

__all__ = ["DescriptionResolver"]

# of a generated adapter's provenance, told with each answer that uses it
_SHOWN = ("refinement", "method", "ood_score", "ood_limit", "parts", "delta_norm", "generator")


class DescriptionResolver:
    """A ``SelectorResolver``: ``auto`` is answered by ``router``, on its thread; descriptions by
    ``generated``, on another one.
    """

    def __init__(
        self,
        store: AdapterStore,
        encoder: Encoder,
        generated: GeneratedAdapters | None = None,
        learning: Learner | None = None,
    ) -> None:
        self._store = store
        self._generated, self._learning = generated, learning
        self.router = SemanticRouter(encoder, self._profiles)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-descriptions")

    async def resolve(
        self,
        selector: Auto | Description,
        text: str,
        access: AdapterAccess,
        *,
        with_tools: bool = False,
        relist: bool = False,
    ) -> Resolution:
        if isinstance(selector, Auto):
            decision = await self.router.choose(
                text, access.candidates, with_tools=with_tools, relist=relist
            )
            chosen = None if decision.adapter is None else NameRef(decision.adapter)
            return Resolution(chosen, {"method": "auto", **decision.to_json(access.shown)})
        if self._generated is None:
            raise invalid(
                "adapter generation is not enabled on this server; name an adapter instead",
                "adapter",
                "feature_not_enabled",
            )
        request = AdapterGenerationRequest(
            selector.text, method=selector.method, examples=selector.examples
        )
        if selector.examples:
            return await self._learn(request, selector, access)
        ensure = functools.partial(
            self._generated.ensure, request, tenant=access.tenant or "", quota=access.quota
        )
        card = await asyncio.get_running_loop().run_in_executor(self._thread, ensure)
        return _resolution(card, selector)

    async def _learn(
        self, request: AdapterGenerationRequest, selector: Description, access: AdapterAccess
    ) -> Resolution:
        """Waits for the draft, or for what is learnt if ``selector`` says so."""
        if self._learning is None:
            raise invalid(
                "this server learns nothing from examples; send the description alone",
                "adapter",
                "feature_not_enabled",
            )
        learnt = await self._learning.learn(request, access, wait=selector.wait)
        return _resolution(learnt.card, selector, learnt.job)

    def close(self) -> None:
        self.router.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _profiles(self) -> list[AdapterProfile]:
        """Those that ``auto`` may choose: adapters that this server can serve, that generate text,
        and whose card allows it.

        Each key chooses among those that it may use.
        """
        return [
            AdapterProfile(
                card.name,
                card.description,
                card.examples,
                for_tools=card.defaults.get("auto") == "with_tools",
            )
            for card in self._store.list()
            if card.unservable is None
            and card.task is None
            and card.defaults.get("auto") != "never"
        ]


def _resolution(card: AdapterCard, selector: Description, job: str | None = None) -> Resolution:
    """``job`` is told where one may still replace the adapter by a better one."""
    shown = {key: card.provenance[key] for key in _SHOWN if key in card.provenance}
    told: dict[str, object] = {"description": selector.text, **shown}
    if job is not None:
        told["job"] = job
    return Resolution(NameRef(card.name, card.digest[:12]), told)
