"""sentiment: one word says how the writer feels; emoji: the things named, as pictures."""

import random

from loraplex_training.config import AdapterShape, Schedule

from .task import Demo, Pair, Words

_SUBJECTS = Words.parse(
    "hotel|phone|book|film|restaurant|jacket|laptop|concert|course|train ride|coffee "
    "machine|game|headset|museum|tent|pizza|app|chair|haircut|bicycle|camera|flight|shampoo|lamp|service",
    sep="|",
)
_OPINIONS = {
    "positive": Words.parse(
        "I loved every minute of it|it works perfectly|simply wonderful|it made my week|best of"
        " its kind|I would buy it again at once|it exceeded all my hopes|a real joy|I cannot "
        "praise it enough|excellent in every way|I recommend it to all my friends|so good that "
        "I smiled all day|great value and lovely details|a pleasant surprise|absolutely "
        "fantastic|worth every cent|I am thrilled|nothing to complain about, superb|beautifully"
        " made|it brightened my day|I am delighted with it|the quality is outstanding|five "
        "stars from me|I had a great time|a brilliant idea, brilliantly done",
        sep="|",
    ),
    "negative": Words.parse(
        "I regret buying it|it broke after a day|a complete waste of money|never again|I want "
        "my money back|it was terrible from start to end|so disappointing|dirty, loud and "
        "overpriced|it made me angry|worst of its kind|nobody should pay for this|I was bored "
        "to tears|it failed at the first try|rude staff and poor quality|a sad joke|cheap and "
        "badly made|I could not wait for it to end|it gave me a headache|useless|an awful "
        "experience|I hate it|it stopped working within an hour|I am very unhappy with it|a "
        "horrible mess|do not waste your time on this",
        sep="|",
    ),
    "neutral": Words.parse(
        "it arrived on Tuesday|it is blue and weighs two pounds|I have used it twice so far|it "
        "comes with a manual|it costs the same as last year|it opens at nine|my brother has the"
        " same one|it was made in 2019|there are three versions of it|I picked it up after "
        "work|it lasts about two hours|they list it on page four|it is next to the station|you "
        "can order it online|it has a grey cover|it replaces the older model|it comes in a "
        "paper box|we booked it in March|it is made of wood|it takes about ten minutes|it is "
        "sold in most cities|it was announced in spring|it has two buttons on the side|you need"
        " a ticket for it|it fits on a small table",
        sep="|",
    ),
}
_REVIEWS = ("The {s}: {o}.", "About the {s}, {o}.", "{o}! (the {s})", "My view of the {s}: {o}.")
_ASK_FEELING = ("What is the sentiment of this review? {r}", "Classify the sentiment: {r}", "{r}")


def _sentiment(rng: random.Random, held_out: bool) -> Pair:
    label = rng.choice(sorted(_OPINIONS))
    review = rng.choice(_REVIEWS).format(
        s=_SUBJECTS.pick(rng, held_out), o=_OPINIONS[label].pick(rng, held_out)
    )
    return Pair(rng.choice(_ASK_FEELING).format(r=review), label)


_PICTURES = {
    "pizza": "🍕", "coffee": "☕", "cat": "🐱", "dog": "🐶", "apple": "🍎", "car": "🚗",
    "train": "🚂", "moon": "🌙", "sun": "🌞", "rain": "🌧️", "tree": "🌳", "fish": "🐟",
    "book": "📖", "phone": "📱", "rose": "🌹", "cake": "🎂", "guitar": "🎸", "rocket": "🚀",
    "horse": "🐴", "house": "🏠", "banana": "🍌", "bicycle": "🚲", "snake": "🐍", "cheese": "🧀",
}  # fmt: skip
_SCENES = Words(
    [
        "I saw a {a} and a {b} today.",
        "My sister drew a {a} next to a {b}.",
        "We talked about the {a}, then about the {b}.",
        "A {a} is nicer than a {b}, I think.",
        "Yesterday I dreamt of a {a} and a {b}.",
        "The story begins with a {a} and ends with a {b}.",
        "There is a {a} behind the {b}.",
        "First the {a}, then the {b}!",
        "He paid for the {a} and forgot the {b}.",
        "Can you see the {a} on the left and the {b} on the right?",
    ]
)
_ASK_PICTURES = ("In emoji: {t}", "{t}", "Say this with emoji only: {t}")


def _emoji(rng: random.Random, held_out: bool) -> Pair:
    while True:
        a, b = rng.sample(sorted(_PICTURES), 2)
        if ((len(a) * 5 + len(b) * 3 + ord(a[0]) + ord(b[-1])) % 5 == 0) == held_out:
            text = _SCENES.pick(rng, held_out).format(a=a, b=b).replace("a apple", "an apple")
            return Pair(rng.choice(_ASK_PICTURES).format(t=text), _PICTURES[a] + _PICTURES[b])


SENTIMENT = Demo(
    name="sentiment",
    description="Answers with the sentiment of a review: positive, negative or neutral.",
    make=_sentiment,
    accept=lambda expected, answer: answer.strip() == expected,
    shape=AdapterShape(rank=2, alpha=8, targets=("gate_proj", "up_proj", "down_proj")),
    schedule=Schedule(steps=60, lr=1e-3, batch_tokens=640, validate_every=30),
    max_new_tokens=6,
)
EMOJI = Demo(
    name="emoji",
    description="Answers with the things that a sentence names, as emoji.",
    make=_emoji,
    accept=lambda expected, answer: answer.strip() == expected,
    shape=AdapterShape(rank=4, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    schedule=Schedule(steps=80, lr=2e-3, batch_tokens=640, validate_every=40),
    max_new_tokens=16,
)
