"""Adapters for descriptions: generated from the sentence, or learnt from its examples."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.selector import Description, NameRef
from loraplex_generation.errors import GeneratorMismatch, NotTrained
from loraplex_generation.multi_task import METHOD, MOST_TURNS
from loraplex_generation.request import AdapterGenerationRequest, few_shot
from loraplex_server.adapters.learning.generated_adapters import (
    GeneratedAdapters,
)
from loraplex_server.adapters.learning.learning import Learner, LearningRequest, LearningResult
from loraplex_server.adapters.learning.learning_record import answers_chats, serves
from loraplex_server.adapters.learning.store_methods import StoreMethods, order_of
from loraplex_server.errors import ApiError, from_store, invalid
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantThreads

from .resolved_adapter import FewShotExamples

# parts of the provenance that each answer of a generated adapter repeats
_PROVENANCE = (
    "refinement",
    "method",
    "ood_score",
    "ood_limit",
    "parts",
    "delta_norm",
    "generator",
)


@dataclass(frozen=True, slots=True)
class Resolution:
    """The adapter for a description, and an explanation for people."""

    adapter: NameRef | None  # None: the base answers
    explanation: Mapping[str, object]  # JSON-ready
    few_shot: FewShotExamples = ()  # that precede the chat
    system_prompt: str | None = None  # for the base, where no adapter follows descriptions


class DescribedAdapters:
    """Resolves requests with a description. Event loop only; ``threads`` generate."""

    def __init__(
        self,
        generated: GeneratedAdapters,
        threads: TenantThreads,
        learner: Learner | None = None,
        store_methods: StoreMethods | None = None,
    ) -> None:
        """``learner`` None: the server learns nothing from examples."""
        self._generated, self._threads, self._learner = generated, threads, learner
        self._store_methods = store_methods

    async def resolve(
        self, selector: Description, access: AdapterAccess, *, takes_few_shot: bool = False
    ) -> Resolution:
        """``takes_few_shot``: the caller can answer with examples. Raises StoreError, ApiError."""
        request = AdapterGenerationRequest(
            selector.text, method=selector.method, examples=selector.examples
        )
        order = await order_of(self._store_methods, request, access)
        if selector.examples:
            return await self._learn(request, selector, access, takes_few_shot=takes_few_shot)
        ensure = functools.partial(
            self._generated.ensure,
            order.request,
            tenant=access.tenant or "",
            quota=access.quota,
            make=order.make,
        )
        try:
            card = await self._threads.run(access.tenant, ensure)
        except (GeneratorMismatch, NotTrained):
            if not takes_few_shot or selector.method != "auto":
                raise
            explanation = _explanation(None, selector, None, "prompt")
            return Resolution(None, explanation, system_prompt=selector.text)
        return _resolution(card, selector)

    async def _learn(
        self,
        request: AdapterGenerationRequest,
        selector: Description,
        access: AdapterAccess,
        *,
        takes_few_shot: bool,
    ) -> Resolution:
        """Return the learnt adapter, or few-shot examples while these are better.

        The multi-task adapter answers with them, as it was trained, else the base does. A caller
        that takes no examples gets the initial adapter without them.
        """
        if self._learner is None:
            raise invalid(
                "this server learns nothing from examples; send the description alone",
                "adapter",
                "feature_not_enabled",
            )
        try:
            order = LearningRequest(request, access, selector.wait, not takes_few_shot)
            result = await self._learner(order)
        except (ApiError, StoreError) as error:
            if not takes_few_shot or selector.wait or not _is_temporary(error):
                raise
            result = LearningResult(None, None)
        card = result.card
        if card is not None and (answers_chats(card) or not takes_few_shot):
            return _resolution(card, selector, result.job)
        if card is not None and serves(card) == "draft" and card.provenance["method"] == METHOD:
            return _resolution(card, selector, result.job, selector.examples[:MOST_TURNS])
        explanation = _explanation(card, selector, result.job, "turns", ("refinement",))
        return Resolution(None, explanation, few_shot(selector.text, selector.examples))


def _is_temporary(error: ApiError | StoreError) -> bool:
    """Return True for a limit or a failure that few-shot examples can stand in for."""
    answer = from_store(error) if isinstance(error, StoreError) else error
    return answer.status in (429, 503) or answer.code == "quota_exceeded"


def _resolution(
    card: AdapterCard,
    selector: Description,
    job: str | None = None,
    turns: FewShotExamples = (),
) -> Resolution:
    """Return the adapter, with ``turns`` before the chat."""
    served = "turns" if turns else serves(card) if selector.examples else None
    explanation = _explanation(card, selector, job, served)
    return Resolution(NameRef(card.name, card.digest[:12]), explanation, turns)


def _explanation(
    card: AdapterCard | None,
    selector: Description,
    job: str | None,
    serves: str | None,
    provenance: Sequence[str] = _PROVENANCE,
) -> dict[str, object]:
    """Return ``chosen_by``: what answers (``serves``), and the job that may improve the adapter."""
    explanation: dict[str, object] = {"description": selector.text}
    if serves is not None:
        explanation["serves"] = serves
    if job is not None:
        explanation["job"] = job
    if card is not None:
        explanation |= {key: card.provenance[key] for key in provenance if key in card.provenance}
    return explanation
