"""The training descriptions in a few words, as "past tense verb in capital letters please".

A short wording keeps of an operation's phrase the words that tell the operation from the others.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .languages import LANGUAGES
from .tasks import Task

_N_WORDS = 3


class ShortWording(NamedTuple):
    task: int  # index in the tasks asked for
    phrases: tuple[str, str]  # the operation's and the format's that it was made from
    text: str


def short_wordings(tasks: Sequence[Task]) -> list[ShortWording]:
    """One for each training description whose operation's phrase has a telling word."""
    phrases = {(task.operation, phrase) for task in tasks for phrase, _ in task.phrases()}
    uses = Counter((operation, word) for operation, p in phrases for word in set(_words(p)))
    total = Counter[str]()
    for (_, word), n in uses.items():
        total[word] += n

    def telling(operation: str, phrase: str) -> list[str]:
        """The words that are this operation's own: twice at least, and mostly here."""
        found = [
            word
            for word in dict.fromkeys(_words(phrase))
            if 2 <= uses[operation, word] >= total[word] / 2
        ]
        return found[:_N_WORDS]

    return [
        ShortWording(i, (phrase, suffix), _compose(task, words, suffix, nth))
        for i, task in enumerate(tasks)
        for nth, (phrase, suffix) in enumerate(task.phrases())
        if (words := telling(task.operation, phrase))
    ]


def _words(phrase: str) -> list[str]:
    return re.findall(r"[a-z/-]+", phrase.replace("{language}", "").lower())


def _compose(task: Task, words: Sequence[str], suffix: str, nth: int) -> str:
    rng = random.Random(f"{task.name}:{nth}:short")
    content, bare = " ".join(words), suffix.strip(" ,.").lower()
    if task.language:
        language = LANGUAGES[task.language]
        content = rng.choice([f"{content} in {language}", f"{language} {content}"])
    styles = [
        f"{content} {bare} please",
        f"{content}, {bare}",
        f"{bare}: {content}",
        f"give me the {content} {bare}",
        f"{content} {bare}",
    ]
    return " ".join(rng.choice(styles).split()).strip(":, ")
