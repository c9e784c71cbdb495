"""A request for an adapter, and the adapter that was resolved from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.selector import Selector
from loraplex_adapter_store.plan import HeadPlan, HeadTask
from loraplex_server.call_log import ChosenBy
from loraplex_server.errors import invalid

FewShotExamples = Sequence[tuple[str, str]]
"""Prompts with their answers, which become the first turns of a chat."""


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """A parsed request for an adapter. ``selector`` None means the base model."""

    selector: Selector | None
    param: str  # the request field that named the adapter, for errors
    model: str  # ``model`` of the answer
    is_unknown: bool = False  # the model's name is not even a valid adapter name


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """The resolved adapter with its lease. Its owner calls ``release`` exactly once."""

    lease: AdapterLease | None = None
    label: str | None = None  # name in the request, for the answer, logs and metrics
    explanation: Mapping[str, object] | None = None
    few_shot: FewShotExamples = ()  # put before the chat by callers that take examples
    system_prompt: str | None = None  # of a chat without one that the base answers

    def release(self) -> None:
        if self.lease is not None:
            self.lease.release()

    @property
    def head(self) -> HeadPlan | None:
        """Return the head of a classifier, or None for an adapter that generates text."""
        return None if self.lease is None else self.lease.plan.head

    def check_generates(self, param: str) -> None:
        """Raises ApiError (400) for a classifier, whose weights were not trained to write."""
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
        """Return the value of x-loraplex-adapter: ``name@digest``, or ``base``."""
        return "base" if self.lease is None else f"{self.label}@{self.lease.digest[:12]}"

    @property
    def metrics_label(self) -> str:
        """Return the adapter's label in metrics. All mixtures share one, to limit the series."""
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
        """Return the explanation of ``auto``; None if the adapter was chosen otherwise."""
        return self.explanation if self.chosen_by == "auto" else None

    def to_json(self, n_turns: int = 0) -> dict[str, object] | None:
        """Return ``adapter`` of the answer; None if the base was asked for.

        ``n_turns`` is the number of few-shot examples that fitted into the prompt.
        """
        if self.lease is None and self.explanation is None:
            return None
        digest = None if self.lease is None else self.lease.digest
        chosen: dict[str, object] = {"name": self.label, "digest": digest}
        if self.explanation is not None:
            sent = {"turns": n_turns} if self.few_shot else {}
            chosen["chosen_by"] = {**self.explanation, **sent}
        return chosen
