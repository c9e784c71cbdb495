"""Answers ``adapter: "auto"`` with the router and descriptions with the generator."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.selector import Auto, Description, NameRef
from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters import AdapterProfile, Encoder
from loraplex_server.api.errors import ApiError, from_store, invalid
from loraplex_server.api_keys import AdapterAccess

from .generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from .learning import Learner, Learnt
from .learning_record import answers_chats, serves
from .resolver import Resolution, Turns
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
        takes_turns: bool = False,
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
            return await self._learn(request, selector, access, takes_turns=takes_turns)
        ensure = functools.partial(
            self._generated.ensure, request, tenant=access.tenant or "", quota=access.quota
        )
        card = await asyncio.get_running_loop().run_in_executor(self._thread, ensure)
        return _resolution(card, selector)

    async def _learn(
        self,
        request: AdapterGenerationRequest,
        selector: Description,
        access: AdapterAccess,
        *,
        takes_turns: bool,
    ) -> Resolution:
        """What is learnt, waiting for it if ``selector`` says so. Until then, or where that is no
        better, the base with the examples as turns; for who takes no turns the draft.
        """
        if self._learning is None:
            raise invalid(
                "this server learns nothing from examples; send the description alone",
                "adapter",
                "feature_not_enabled",
            )
        try:
            learnt = await self._learning.learn(
                request, access, wait=selector.wait, needs_adapter=not takes_turns
            )
        except (ApiError, StoreError) as error:
            if not takes_turns or selector.wait or not _is_no_matter(error):
                raise
            learnt = Learnt(None, None)
        card = learnt.card
        if card is not None and (answers_chats(card) or not takes_turns):
            return _resolution(card, selector, learnt.job)
        told = _told(card, selector, learnt.job, "turns", ("refinement",))
        return Resolution(None, told, _turns(selector))

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


def _is_no_matter(error: ApiError | StoreError) -> bool:
    """For who has turns: that no more jobs or adapters may be now, or that learning is broken."""
    told = from_store(error) if isinstance(error, StoreError) else error
    return told.status in (429, 503) or told.code == "quota_exceeded"


def _resolution(card: AdapterCard, selector: Description, job: str | None = None) -> Resolution:
    told = _told(card, selector, job, serves(card) if selector.examples else None)
    return Resolution(NameRef(card.name, card.digest[:12]), told)


def _told(
    card: AdapterCard | None,
    selector: Description,
    job: str | None,
    serves: str | None,
    shown_of_card: Sequence[str] = _SHOWN,
) -> dict[str, object]:
    """``serves``: what answers, of examples. ``job`` may still replace it by something better."""
    told: dict[str, object] = {"description": selector.text}
    if serves is not None:
        told["serves"] = serves
    if job is not None:
        told["job"] = job
    if card is not None:
        told |= {key: card.provenance[key] for key in shown_of_card if key in card.provenance}
    return told


def _turns(selector: Description) -> Turns:
    """The examples of ``selector``, the sentence in front of the first one's prompt."""
    (prompt, answer), *others = selector.examples
    return [(f"{selector.text}\n{prompt}", answer), *others]
