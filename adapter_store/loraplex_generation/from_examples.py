"""A description and a few pairs of prompt and answer in, a LoRA out that was tried on them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraplex_adapter_store.selector import MAX_EXAMPLES, MIN_EXAMPLES
from loraplex_generation.zoo.tasks import Example

from .errors import NothingLearnt, OutOfTime, UnfitExamples
from .frozen_base import FrozenBase
from .judged_pairs import HeldOut
from .packing import ChatCodec, Row
from .refinement import (
    Progress,
    Refinement,
    RefinementProgress,
    RefinementRecipe,
    refine,
)
from .service import GeneratedAdapter, Generator
from .turns import score_turns

__all__ = [
    "DEFAULT_BUDGET_S",
    "encode_pairs",
    "generate_from_examples",
    "read_pairs",
]

_MAX_TOKENS = 512  # of a prompt and its answer
DEFAULT_BUDGET_S = 30.0
_DRAFT, _MEAN = "draft", "library mean"  # of the starts; the others are readings


def generate_from_examples(
    generator: Generator,
    base: FrozenBase,
    codec: ChatCodec,
    description: str,
    pairs: Sequence[Example],
    *,
    wordings: Sequence[str] = (),
    unlabelled: Sequence[str] = (),
    method: str = "auto",
    seed: int = 0,
    samples: int = 0,
    force: bool = False,
    recipe: RefinementRecipe = RefinementRecipe(),  # noqa: B008  frozen value
    deadline: float = math.inf,
    report: Progress = lambda progress: None,
) -> GeneratedAdapter:
    """The draft from the sentence, or the library's mean, trained on ``pairs``; or another reading
    of the sentence, if that gets them all right.

    Which of them, how far, and whether at all, the pairs themselves decide; training is judged by
    copies that have not seen all of them. The card's ``refinement`` says what came of it. That goes
    for a sentence that the guard refuses, too: the pairs say what is meant. ``held_out.turns``
    there is what the base does on the same pairs with the others as turns (``turns``).
    ``unlabelled`` are ``Generator.generate``'s prompts; ``deadline`` and ``report`` as ``refine``
    has them. Where the pairs gain nothing, the draft is returned. Raises UnfitExamples, OutOfTime,
    and NothingLearnt for a refused sentence whose pairs gain nothing, unless ``force``.
    """
    began = time.perf_counter()
    rows = encode_pairs(codec, pairs)
    draft = generator.generate(
        description,
        wordings=wordings,
        prompts=unlabelled,
        method=method,
        seed=seed,
        samples=samples,
        force=True,
    )
    asked = generator.read(description, wordings)
    readings = generator.readings(asked, method)
    starts = {_DRAFT: draft.vector, _MEAN: generator.library_mean()}
    starts |= {name: reading.vector for name, reading in readings.items()}
    has_draft = force or not generator.refuses(asked, method)

    def look_up() -> None:
        report(RefinementProgress("judging turns", 0, recipe.n_steps, None))

    try:
        turns = score_turns(
            base, codec, description, pairs, n_tokens=recipe.judge_tokens, look_up=look_up
        )
    except TimeoutError:
        raise OutOfTime from None
    made = refine(
        base,
        draft.layout,
        generator.span,
        codec.head,
        rows,
        starts,
        recipe=recipe,
        deadline=deadline,
        report=report,
    )
    does_it = made.gained or made.start_is_right
    if not (does_it or has_draft):
        raise NothingLearnt(len(pairs), made.after.nll, timed_out=made.timed_out)
    if not does_it:  # the mean alone is no answer
        made = replace(made, vector=draft.vector, start=_DRAFT, after=made.before)
    card = {
        **draft.card,
        "examples": len(pairs),
        "refinement": _told(made, turns),
        "delta_norm": round(draft.layout.delta_norm(made.vector), 4),
        "milliseconds": round(1000 * (time.perf_counter() - began), 1),
    }
    if made.start != _DRAFT:
        reading = readings.get(made.start)
        parts = {made.start: 1.0} if reading is None else reading.parts
        card["parts"] = {part: round(share, 4) for part, share in parts.items()}
    return generator.dressed(made.vector, card)


def read_pairs(path: Path) -> list[Example]:
    """JSON lines of ``{"prompt": …, "answer": …}``. Raises UnfitExamples, which names the line."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnfitExamples(f"line {number} is no JSON: {error}") from None
        if (
            not isinstance(data, dict)
            or set(data) != {"prompt", "answer"}
            or not all(isinstance(value, str) for value in data.values())
        ):
            raise UnfitExamples(f'line {number} must be {{"prompt": "…", "answer": "…"}}')
        pairs.append(Example(data["prompt"], data["answer"]))
    return pairs


def encode_pairs(codec: ChatCodec, pairs: Sequence[Example]) -> list[Row]:
    """Raises UnfitExamples for too few, too many, too long, or a prompt that comes twice."""
    if not MIN_EXAMPLES <= len(pairs) <= MAX_EXAMPLES:
        told = f"{len(pairs)} examples; {MIN_EXAMPLES} to {MAX_EXAMPLES} can be used"
        raise UnfitExamples(told)
    if len({pair.prompt for pair in pairs}) < len(pairs):
        raise UnfitExamples("a prompt comes twice: one of the two could not be held out")
    rows = [codec.row(pair) for pair in pairs]
    for number, row in enumerate(rows, start=1):
        if len(row.tokens) > _MAX_TOKENS:
            raise UnfitExamples(
                f"example {number} has {len(row.tokens)} tokens, at most {_MAX_TOKENS} are read; "
                "train an adapter with `loraplex train` for long texts"
            )
    return rows


def _told(made: Refinement, turns: HeldOut) -> dict[str, object]:
    return {
        "finished": True,
        "start": made.start,
        "gained": made.gained or made.start != _DRAFT,
        "start_is_right": made.start_is_right,
        "way": made.way,
        "steps": made.steps,
        "n_steps": made.n_steps,
        "timed_out": made.timed_out,
        "seconds": round(made.seconds, 1),
        "held_out": {
            "before": _shown(made.before),
            "after": _shown(made.after),
            "turns": _shown(turns),
        },
    }


def _shown(score: HeldOut) -> dict[str, object]:
    return {"exact": score.exact, "of": score.n, "nll": round(score.nll, 4)}
