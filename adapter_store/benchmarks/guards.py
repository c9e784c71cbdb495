"""Which guard tells descriptions that the generator can follow from those that it cannot.

    python adapter_store/benchmarks/guards.py [--out FILE]

Nothing here reads a test task or its wordings. To be accepted: wordings of trained tasks, and of
the validation tasks that combine known factors, in three styles, each scored by a guard that was
fitted without its operation's phrase and its format's. To be refused: each family of operations, by
a guard that was fitted without it; a validation task of an unknown family; sentences that have
nothing to do with any task, and the same with a known format's phrase behind. All are compared
where one in twenty of the first is refused. Prints Markdown; `--out` writes it. Minutes on a core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.factors import Factors, train_factor_head
from loraplex_generation.guard import OodDetector, as_new, class_means, whitener
from loraplex_generation.sentences import Encoded, SentenceEncoder
from loraplex_generation.zoo.formats import FORMATS
from loraplex_generation.zoo.short_wordings import short_wordings
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task
from loraplex_server.model.pull import resolve_encoder

FALSE_ALARMS = 0.05
STYLES = ("plain", "casual", "short")
CHAT = (
    "Tell me about the weather",
    "What should I cook tonight?",
    "Write a short story about a dragon",
    "Who won the football match?",
    "How do vaccines work?",
    "Recommend me a good novel",
    "Sing me a lullaby",
    "hello, how are you today",
    "I feel sad, cheer me up",
    "Plan a weekend trip to the mountains",
    "Explain how a bicycle stays upright",
    "Give me advice for a job interview",
    "What is the meaning of life",
    "Tell a joke about cats",
    "Help me write a cover letter",
    "my laptop does not start any more",
    "best pizza near me",
    "Describe a sunset over the desert",
    "Play chess with me",
    "Why is the sky blue?",
    "Draw a picture of a horse",
    "what do you think about politics",
    "Be a pirate and talk like one",
    "Compose a haiku about autumn leaves",
)
OTHER_TASKS = (
    "Translate the sentence into French",
    "Summarise the text in three points",
    "Correct the spelling mistakes",
    "Add up all the numbers",
    "Write a Python function that sorts a list",
    "Answer the question from the passage",
    "Remove all vowels from the word",
    "Find the synonyms of the word",
    "Count the letters of the word",
    "Guess the author of the quote",
    "Classify the e-mail as spam or not",
    "Make the text sound more polite",
    "Solve the equation for x",
    "Generate a strong password",
    "Write an SQL query for this question",
    "Say which language the text is in",
    "Rewrite the paragraph in simple words",
    "Give the capital of the country",
    "Tell whether the number is prime",
    "Expand the abbreviation",
    "Write a title for the article",
    "Round the price to whole euros",
    "Give the chemical symbol of the element",
    "Rhyme with the given word",
)
NOISE = (
    "xkcd plmokn ijbuhv",
    "lorem ipsum dolor sit amet",
    "aaaaaaa",
    "42",
    "???",
    "qwertz uiop 123 yxcv",
    "foo bar baz",
    "the the the the",
    "zzzz grmbl fnord",
    "...",
    "9f8e7d6c5b",
    "blah blah whatever",
)
UNKNOWN_FAMILY = "larger/plain"  # of the validation tasks


class Wording(NamedTuple):
    task: Task
    phrases: tuple[str, str]
    style: str
    text: str


class Known(NamedTuple):
    """What a guard may be fitted on."""

    wordings: Sequence[Wording]
    encoded: Encoded


Score = Callable[[Encoded], Tensor]  # [n], higher is stranger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = table(SentenceEncoder(resolve_encoder()))
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def table(encoder: SentenceEncoder) -> str:
    sets = load_split().sets
    trained = wordings_of([Task.parse(name) for name in sets["train"]])
    known = {w.task.operation for w in trained}
    new = [t for name in sets["validation"] if (t := Task.parse(name)).operation in known]
    accepted = [*trained, *wordings_of(new)]
    every = encoder.encode([w.text for w in accepted])
    refused = {name: encoder.encode(texts) for name, texts in unknown().items()}
    lines = [
        "| score | families left out | " + " | ".join(refused) + " | "
        "false alarms: " + ", ".join(STYLES) + " |",
        "| --- " * (len(refused) + 3) + "|",
    ]
    for name, fit in GUARDS.items():
        scores = scores_as_new(fit, accepted, every, len(trained))
        limit = float(torch.quantile(scores, 1 - FALSE_ALARMS))
        families = torch.stack(
            [share(s, limit) for s in scores_left_out(fit, trained, every)]
        ).mean()
        whole = fit(Known(trained, every.rows(torch.arange(len(trained)))))
        shares = [families, *[share(whole(encoded), limit) for encoded in refused.values()]]
        alarms = [
            share(scores[torch.tensor([w.style == style for w in accepted])], limit)
            for style in STYLES
        ]
        cells = [name, *[f"{s:.0%}" for s in shares], ", ".join(f"{a:.0%}" for a in alarms)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wordings_of(tasks: Sequence[Task]) -> list[Wording]:
    found = [
        Wording(task, phrases, style, text)
        for task in tasks
        for style, texts in (("plain", task.descriptions()), ("casual", task.casual_descriptions()))
        for phrases, text in zip(task.phrases(), texts, strict=True)
    ]
    short = short_wordings(tasks)
    return found + [Wording(tasks[i], phrases, "short", text) for i, phrases, text in short]


def unknown() -> dict[str, list[str]]:
    """Texts that ought to be refused, by kind; none of them is fitted on."""
    rng = random.Random(0)
    suffixes = [s for dressing in FORMATS.values() for s in dressing.suffixes if s]
    kinds = {"chat": CHAT, "other tasks": OTHER_TASKS, "noise": NOISE}
    return {
        "`larger`": Task.parse(UNKNOWN_FAMILY).descriptions(),
        **{name: list(texts) for name, texts in kinds.items()},
        "these with a format": [
            text.rstrip("?.") + suffix
            for texts in kinds.values()
            for text in texts
            for suffix in rng.sample(suffixes, 3)
        ],
    }


def scores_as_new(
    fit: Callable[[Known], Score], accepted: Sequence[Wording], encoded: Encoded, n_trained: int
) -> Tensor:
    """[n]: of each wording, by a guard that knows none of its phrases, nor untrained tasks."""
    scores = torch.zeros(len(accepted))
    operations = [w.task.operation for w in accepted]
    for asked, seen in as_new(operations, [w.phrases for w in accepted]):
        kept = seen[seen < n_trained]
        known = Known([accepted[i] for i in kept.tolist()], encoded.rows(kept))
        scores[asked] = fit(known)(encoded.rows(asked))
    return scores


def scores_left_out(
    fit: Callable[[Known], Score], trained: Sequence[Wording], encoded: Encoded
) -> Iterator[Tensor]:
    """For each family the scores of its wordings, by a guard that knows nothing of it."""
    families = [w.task.family for w in trained]
    for family in dict.fromkeys(families):
        inside = torch.tensor([f == family for f in families])
        kept = (~inside).nonzero()[:, 0]
        known = Known([trained[i] for i in kept.tolist()], encoded.rows(kept))
        yield fit(known)(encoded.rows(inside.nonzero()[:, 0]))


def share(scores: Tensor, limit: float) -> Tensor:
    return (scores > limit).float().mean()


def best_cosine(known: Known) -> Score:
    """The guard of the first release."""
    long = torch.tensor([w.style != "short" for w in known.wordings])
    return to_nearest(known.encoded.sentence[long])


def best_cosine_with_short(known: Known) -> Score:
    return to_nearest(known.encoded.sentence)


def eight_best(known: Known) -> Score:
    return to_nearest(known.encoded.sentence, k=8)


def without_mean(known: Known) -> Score:
    mean = known.encoded.sentence.mean(0)
    return after(lambda x: x - mean, known.encoded.sentence)


def without_formats(known: Known) -> Score:
    """After removing the thirty directions in which suffix and style move a phrase most."""
    x = known.encoded.sentence
    spread = around_means(x, [f"{w.task.content} {w.phrases[0]}" for w in known.wordings])
    top = torch.linalg.svd(spread, full_matrices=False).Vh[:30]
    return after(lambda q: q - q @ top.T @ top, x)


def relative_mahalanobis(known: Known) -> Score:
    """Distance to the nearest content, less the distance to all wordings together."""
    x, names = known.encoded.sentence, [w.task.content for w in known.wordings]
    near, far = whitener(around_means(x, names)), whitener(x - x.mean(0))
    means, middle = class_means(x, names)[0] @ near, x.mean(0)

    def score(encoded: Encoded) -> Tensor:
        q = encoded.sentence
        nearest = torch.cdist(q @ near, means).amin(-1).square()
        return nearest - ((q - middle) @ far).square().sum(-1)

    return score


def factor_energy(known: Known) -> Score:
    """−log Σ exp of the operation's logits, of the head that the end-to-end map reads with."""
    tasks = [w.task for w in known.wordings]
    factors = Factors.of(tasks)
    labels = torch.tensor([factors.labels(task) for task in tasks])
    head = train_factor_head(known.encoded, labels, factors.groups)
    return lambda encoded: -head(encoded)[0].logsumexp(-1)


def whitened_wordings(known: Known) -> Score:
    """Whitened within operations, nearest wording."""
    x = known.encoded.sentence
    whiten = whitener(around_means(x, [w.task.operation for w in known.wordings]))
    return after(lambda q: q @ whiten, x)


def whitened_contents(known: Known) -> Score:
    """Whitened within operation × language, nearest mean of these."""
    x, names = known.encoded.sentence, [w.task.content for w in known.wordings]
    whiten = whitener(around_means(x, names))
    return after(lambda q: q @ whiten, class_means(x, names)[0])


def shipped(known: Known) -> Score:
    """Whitened within operations, nearest mean of an operation."""
    operations = [w.task.operation for w in known.wordings]
    guard = OodDetector.without_limit(known.encoded.sentence, operations)
    return lambda encoded: guard.score(encoded.sentence)


def shipped_and_best_cosine(known: Known) -> Score:
    one, two = shipped(known), best_cosine_with_short(known)
    return lambda encoded: one(encoded) + two(encoded)


def to_nearest(references: Tensor, k: int = 1) -> Score:
    return lambda encoded: 1 - (encoded.sentence @ references.T).topk(k, -1).values.mean(-1)


def after(change: Callable[[Tensor], Tensor], references: Tensor) -> Score:
    """One minus the best cosine after a linear change of both sides."""
    changed = F.normalize(change(references), dim=-1)
    return lambda encoded: 1 - (F.normalize(change(encoded.sentence), dim=-1) @ changed.T).amax(-1)


def around_means(x: Tensor, names: Sequence[str]) -> Tensor:
    means, owner = class_means(x, names)
    return x - means[owner]


GUARDS: dict[str, Callable[[Known], Score]] = {
    "best cosine to a long wording (before)": best_cosine,
    "best cosine to a long or short wording": best_cosine_with_short,
    "mean of the eight best": eight_best,
    "best cosine, mean taken out": without_mean,
    "best cosine, suffix directions taken out": without_formats,
    "energy of the factor head": factor_energy,
    "relative Mahalanobis": relative_mahalanobis,
    "whitened within contents, best content": whitened_contents,
    "whitened within operations, best wording": whitened_wordings,
    "**whitened within operations, best operation**": shipped,
    "the last, plus best cosine": shipped_and_best_cosine,
}


if __name__ == "__main__":
    main()
