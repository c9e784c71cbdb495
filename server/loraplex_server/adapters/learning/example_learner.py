"""Learning from pairs of prompt and answer: Adam from the best start, judged by held-out pairs.

pairs ──► scores of the starts, of the base and of the pairs as turns of a chat
          └► a start that gets all pairs right is kept; else the likeliest start learns
             ├ without the held-out pairs, until most of the time is over or it beats the turns
             └ with all pairs for the rest

The description is the system turn of every chat, in training as in serving.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from loraplex_adapter_store.names.selector import MAX_EXAMPLES, MIN_EXAMPLES
from loraplex_adapter_store.report import JsonValue
from loraplex_generation.errors import BudgetTooShort, OutOfTime, UnfitExamples
from loraplex_generation.generated import GeneratedAdapter
from loraplex_generation.request import AdapterGenerationRequest, few_shot
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import Outcome, TrainingEngine, Work
from loraplex_training.engine.losses import cross_entropy
from loraplex_training.errors import ExamplesError
from loraplex_training.examples import Chat, Message, tokenise

from .training_thread import TrainingThread

_MAX_TOKENS = 768  # of a prompt with the description and its answer
_TURN_TOKENS = 1024  # of the pairs as turns
_SHAPE = LoraShape(rank=8, alpha=16.0)  # of a start from nothing
_LR, _WARM_UP = 1e-3, 4
_BATCH = 8  # pairs of a step
_MOST_HELD_OUT = 8
_MORE_JUDGED = 4  # pairs that choose the start, beside those
_STEPS_AT_LEAST = 2  # that a budget must have time for
_UNSEEN_SHARE = 0.6  # of the time after which the held-out pairs may be learnt, too
_LEARNT = 0.01  # nats a token: nothing is left to learn
_BACKWARD = 3.0  # cost of forward and backward, relative to a forward alone
_SPARE = 1.3  # times the last step: the time that the next one may take


@dataclass(frozen=True, slots=True)
class Start:
    """An adapter that learning may begin with."""

    name: str
    make: Callable[[TrainingEngine], LearningAdapter]


class Score(NamedTuple):
    """A score on pairs: how likely their answers are, and how many a greedy answer gets right."""

    nll: float  # nats a token of the answers
    right: int
    n: int

    def beats(self, other: "Score") -> bool:
        return (self.right, -self.nll) > (other.right, -other.nll)

    def holds_against(self, other: "Score") -> bool:
        """Return False if the other has more right answers, by over a quarter of the pairs.

        Four held-out pairs cannot tell a smaller difference. The likelihood does not count: an
        adapter that has learnt is sure of its answers, so each wrong one costs it many nats.
        """
        return self.right >= other.right - self.n // 4

    def to_json(self) -> dict[str, JsonValue]:
        return {"exact": self.right, "of": self.n, "nll": round(self.nll, 4)}


@dataclass(slots=True)
class LearningProgress:
    """The state of a job, for its followers."""

    stage: str
    share: float  # of the time
    step: int = 0
    held_out_nll: float | None = None


class Learnt(NamedTuple):
    adapter: GeneratedAdapter | None  # None: nothing does better than the base
    refinement: dict[str, JsonValue]  # how it was chosen, for the card


Report = Callable[[LearningProgress], None]
"""Called between the steps. What it raises ends the learning."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs as data, and as a chat of turns before each held-out one."""

    rows: list[Datum]
    turns: list[Datum]  # of the held-out pairs
    held_out: list[int]  # indices of rows
    system_prompt: str | None  # None: the base's template has no system turn

    @property
    def seen(self) -> list[int]:
        return [i for i in range(len(self.rows)) if i not in self.held_out]

    @property
    def judged(self) -> list[Datum]:
        """The pairs that the starts are scored on: first the held-out ones, then some others."""
        return [self.rows[i] for i in (*self.held_out, *self.seen[:_MORE_JUDGED])]

    def n_tokens(self, n_starts: int) -> int:
        """Return the tokens of the shortest useful run, as costly as forward and backward."""
        held_out = sum(len(self.rows[i]) for i in self.held_out)
        turns = max(map(len, self.turns)) + held_out  # the turns before them are computed once
        looks = turns + n_starts * sum(map(len, self.judged)) + held_out
        longest = sorted(map(len, self.rows))[-_BATCH:]
        return int(looks / _BACKWARD) + _STEPS_AT_LEAST * sum(longest)


class ExampleLearner:
    """Event loop only. ``prepare`` may be called on any thread."""

    def __init__(
        self,
        thread: TrainingThread,
        tokenizer: object,
        base_name: str,
        starts: Callable[[AdapterGenerationRequest], Sequence[Start]],
    ) -> None:
        """``starts`` finds adapters that may fit the description; it may block."""
        self._thread, self._tokenizer, self._base_name = thread, tokenizer, base_name
        self._starts = starts

    def prepare(self, request: AdapterGenerationRequest) -> Pairs:
        """Tokenise the pairs, in tens of milliseconds. Raises UnfitExamples."""
        pairs = request.examples
        if not MIN_EXAMPLES <= len(pairs) <= MAX_EXAMPLES:
            raise UnfitExamples(
                f"{len(pairs)} examples; {MIN_EXAMPLES} to {MAX_EXAMPLES} can be used"
            )
        if len({prompt for prompt, _ in pairs}) < len(pairs):
            raise UnfitExamples("a prompt comes twice: one of the two could not be held out")
        if not getattr(self._tokenizer, "chat_template", None):
            raise UnfitExamples(
                f"the base {self._base_name} has no chat template, in which examples are learnt; "
                "put a chat_template.jinja into its folder, or serve a base that has one"
            )
        return self._encode(request)

    def check_budget(self, pairs: Pairs, budget_s: float) -> None:
        """Raise BudgetTooShort if the last jobs' speed leaves no time for one score."""
        rate, n = self._thread.tokens_per_s, len(pairs.rows)
        if rate is not None and (needed := _SPARE * pairs.n_tokens(2) / rate) > budget_s:
            raise BudgetTooShort(
                f"budget_s is {budget_s:g}, and {n} examples of "
                f"{sum(map(len, pairs.rows)) // n} tokens need about {needed:.0f} s "
                f"here ({rate:.0f} tokens a second); give budget_s {needed:.0f} or fewer examples"
            )

    async def learn(
        self,
        request: AdapterGenerationRequest,
        pairs: Pairs,
        tenant: str,
        budget_s: float,
        report: Report,
    ) -> Learnt:
        """Return the adapter that does best on the held-out pairs, if it beats the base.

        ``pairs`` are those that ``prepare`` returned for the request. Ends within ``budget_s`` and
        about a step. Raises OutOfTime if the time is over before the
        first score of what was learnt.
        """
        run = _Run(self._thread, tenant, pairs, budget_s, report)
        starts = {"base": await self._thread.new_adapter(_SHAPE, 0)}
        for start in await asyncio.to_thread(self._starts, request):
            starts[start.name] = await self._thread.run(tenant, start.make)
        try:
            adapter, refinement = await run.best(starts)
        except TimeoutError:
            raise OutOfTime from None
        if not refinement["gained"]:
            return Learnt(None, refinement)
        tensors = await self._thread.run(tenant, lambda engine: adapter.tensors(), adapter)
        card: dict[str, object] = {
            "description": request.description,
            "method": "examples",
            "examples": len(request.examples),
        }
        config = adapter.peft_config(self._base_name)
        made = GeneratedAdapter(config, tensors, card, pairs.system_prompt)
        return Learnt(made, refinement)

    def _encode(self, request: AdapterGenerationRequest) -> Pairs:
        pairs = request.examples
        rng = random.Random(request.key)
        n_held_out = min(max(1, len(pairs) // 4), _MOST_HELD_OUT)
        held_out = sorted(rng.sample(range(len(pairs)), n_held_out))
        system: str | None = request.description
        try:
            self._row(system, [pairs[0]], "example 1")
        except ExamplesError:
            raise
        except Exception:  # of the base's own template, which knows no system turn
            system = None
        rows = [self._row(system, [pair], f"example {i}") for i, pair in enumerate(pairs, 1)]
        seen = [i for i in range(len(pairs)) if i not in held_out]
        while sum(len(rows[i]) for i in seen) > _TURN_TOKENS:
            seen = seen[: len(seen) * 3 // 4]
        shown = few_shot(request.description, [pairs[i] for i in seen])
        turns = [self._row(None, [*shown, pairs[i]], f"example {i + 1}") for i in held_out]
        return Pairs(rows, turns, held_out, system)

    def _row(self, system: str | None, pairs: Sequence[tuple[str, str]], where: str) -> Datum:
        """Return a chat of answered prompts, of which the last answer has the loss."""
        messages = [] if system is None else [Message(role="system", content=system)]
        for prompt, answer in pairs:
            messages.append(Message(role="user", content=prompt))
            messages.append(Message(role="assistant", content=answer))
        most = _MAX_TOKENS if len(pairs) == 1 else 2 * (_TURN_TOKENS + _MAX_TOKENS)
        try:
            example = tokenise(Chat(messages), self._tokenizer, max_len=most, where=where)
        except ExamplesError as error:
            raise UnfitExamples(
                f"{error}; train an adapter with `loraplex train` for long texts"
            ) from error
        datum = Datum.of_chat(example.tokens, example.learn)
        given = (datum.weights == 0).nonzero()  # the last answer is what follows them all
        datum.weights[: int(given[-1])] = 0
        return datum


class _Run:
    """Learns from the pairs once."""

    def __init__(
        self,
        thread: TrainingThread,
        tenant: str,
        pairs: Pairs,
        budget_s: float,
        report: Report,
    ) -> None:
        self._thread, self._tenant, self.pairs = thread, tenant, pairs
        self._began, self._budget_s = time.monotonic(), budget_s
        self._report = report
        self._rng = random.Random(0)
        self._order: list[int] = []
        self._step_s = 0.0
        self._loss: float | None = None  # nats a token, of the last steps
        self._progress = LearningProgress("scoring", 0.0)

    async def best(
        self, starts: Mapping[str, LearningAdapter]
    ) -> tuple[LearningAdapter, dict[str, JsonValue]]:
        """Return the adapter to serve, and the card's record of how it was chosen."""
        pairs, held_out = self.pairs, [self.pairs.rows[i] for i in self.pairs.held_out]
        judged = pairs.judged
        scores: dict[str, tuple[Score, Score]] = {}
        for name, adapter in starts.items():
            outcome = await self._scored(adapter, judged)
            scores[name] = _score(judged, outcome), _score(held_out, outcome)
        base = scores["base"][1]
        turns = _score(pairs.turns, await self._scored(starts["base"], pairs.turns))
        name = min(starts, key=lambda each: scores[each][0].nll)
        adapter, before = starts[name], scores[name][1]
        after, steps, timed_out = before, 0, False
        is_right = scores[name][0].right == len(judged)
        if not is_right:
            start = await self._thread.run(self._tenant, lambda _: adapter.weights(), adapter)
            after, timed_out = await self._learn(adapter, held_out, (base, turns, before))
            steps = adapter.n_steps
            if not all(after.holds_against(other) for other in (before, base)):
                after = before
                await self._thread.run(self._tenant, lambda _: adapter.load_state(start), adapter)
        gained = after.beats(base) or (is_right and name != "base")
        record: dict[str, JsonValue] = {
            "finished": True,
            "start": name,
            "gained": gained,
            "start_is_right": is_right,
            "steps": steps,
            "timed_out": timed_out,
            "beats_turns": after.holds_against(turns),
            "seconds": round(time.monotonic() - self._began, 1),
            "held_out": {
                "base": base.to_json(),
                "before": before.to_json(),
                "after": after.to_json(),
                "turns": turns.to_json(),
            },
        }
        return adapter, record

    async def _learn(
        self, adapter: LearningAdapter, held_out: Sequence[Datum], others: Sequence[Score]
    ) -> tuple[Score, bool]:
        """Learn until the time is over. Return the score on unseen pairs, and if time ended it."""
        rows = self.pairs.seen
        score: Score | None = None
        while self._has_time(held_out if score is None else ()):
            if score is None and self._share >= _UNSEEN_SHARE:
                looked = _score(held_out, await self._scored(adapter, held_out))
                self._progress.held_out_nll = looked.nll
                if all(looked.holds_against(other) for other in others):
                    score, rows, self._order = looked, list(range(len(self.pairs.rows))), []
                    continue
            try:
                await self._step(adapter, rows)
            except TimeoutError:
                break
            if self._is_learnt and len(self._order) < _BATCH:
                break
        if adapter.n_steps == 0:
            raise OutOfTime
        if score is None:
            score = _score(held_out, await self._scored(adapter, held_out))
        return score, not self._is_learnt

    async def _step(self, adapter: LearningAdapter, rows: Sequence[int]) -> None:
        if len(self._order) < min(_BATCH, len(rows)):
            fresh = list(rows)
            self._rng.shuffle(fresh)
            self._order += fresh
        chosen = [self.pairs.rows[i] for i in self._order[:_BATCH]]
        self._order = self._order[_BATCH:]
        n_answers = sum(datum.n_answers for datum in chosen)
        began = time.monotonic()
        lr = _LR * min(1.0, (adapter.n_steps + 1) / _WARM_UP) * max(0.05, 1 - self._share)

        def loss(logprobs: Tensor, datum: Datum) -> Tensor:
            return cross_entropy(logprobs, datum) / n_answers

        outcome = await self._compute(Work(adapter, chosen, loss))
        await self._thread.step(self._tenant, adapter, Adam(lr=lr))
        self._step_s = time.monotonic() - began
        old = self._loss
        self._loss = outcome.loss if old is None else 0.7 * old + 0.3 * outcome.loss
        self._progress.stage, self._progress.step = "training", adapter.n_steps
        self._tell()

    async def _scored(self, adapter: LearningAdapter, data: Sequence[Datum]) -> "_Scored":
        self._tell()
        outcome = await self._compute(Work(adapter, data), backward=False)
        return _Scored([float(p.sum()) for p in outcome.logprobs], outcome.right)

    async def _compute(self, work: Work, *, backward: bool = True) -> Outcome:
        """Raises TimeoutError when the time is over."""
        left_s = self._began + self._budget_s - time.monotonic()
        call = self._thread.forward_backward(self._tenant, work, backward=backward)
        return await asyncio.wait_for(call, max(0.0, left_s))

    def _tell(self) -> None:
        self._progress.share = self._share
        self._report(self._progress)

    @property
    def _is_learnt(self) -> bool:
        return self._loss is not None and self._loss < _LEARNT

    @property
    def _share(self) -> float:
        """The share of the time that is over."""
        return min(1.0, (time.monotonic() - self._began) / self._budget_s)

    def _has_time(self, still_to_score: Sequence[Datum]) -> bool:
        needed = _SPARE * self._step_s
        if still_to_score and self._step_s:
            n_step = sum(map(len, self.pairs.rows)) / len(self.pairs.rows) * _BATCH
            needed += self._step_s * sum(map(len, still_to_score)) / n_step / _BACKWARD
        return time.monotonic() + needed < self._began + self._budget_s


class _Scored(NamedTuple):
    logprobs: list[float]  # of each datum's answer
    right: list[bool]


def _score(data: Sequence[Datum], scored: _Scored) -> Score:
    """Return the score of the first data that were scored."""
    n = len(data)
    n_tokens = sum(datum.n_answers for datum in data)
    return Score(-sum(scored.logprobs[:n]) / n_tokens, sum(scored.right[:n]), n)
