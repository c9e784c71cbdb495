"""extract-email and json-answers: the facts of a text, and nothing else."""

import json
import random

from loraplex_training.config import AdapterShape, Schedule

from .task import Demo, Pair, Words
from .words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES

_HOSTS = Words.parse(
    "acme globex initech umbrella hooli vandelay stark wayne wonka cyberdyne tyrell oscorp "
    "soylent monarch duff gringott aperture massive virtucon zorg bluefin redwood northwind"
    " contoso fabrikam"
)
_ENDINGS = ("com", "org", "net", "de", "io", "co.uk")
_TEXTS = Words(
    [
        "Hi, this is {name}. Please send the invoice to {mail} before Friday, thanks!",
        "For questions about your order contact {name} at {mail} or call us on weekdays.",
        "{name} ({mail}) will lead the workshop in {city} next month.",
        "My new address is {mail}, the old one stops working in June. Best, {name}",
        "The meeting in {city} moved to Tuesday. Reply to {mail} if you cannot come.",
        "Applications go to {mail}; the deadline is the end of the month. {name} decides.",
        "Dear team, {name} joined us from {city}. You can reach the new colleague under {mail}.",
        "I met {name} at the fair in {city} and noted this contact: {mail}.",
        "Support hours are nine to five. Write to {mail} at any time, says {name}.",
        "If the parcel for {name} does not arrive in {city}, let {mail} know at once.",
    ]
)
_ASK_MAIL = (
    "Extract the email address: {text}",
    "What is the email address in this text? {text}",
    "{text}\n\nEmail address?",
)


def _email(rng: random.Random, held_out: bool) -> Pair:
    first, last = FIRST_NAMES.pick(rng, held_out), LAST_NAMES.pick(rng, held_out)
    user = rng.choice(("{f}.{l}", "{f}", "{f}_{l}", "{i}{l}", "{f}{n}", "{l}.{f}")).format(
        f=first.lower(), l=last.lower(), i=first[0].lower(), n=rng.randrange(10, 100)
    )
    mail = f"{user}@{_HOSTS.pick(rng, held_out)}.{rng.choice(_ENDINGS)}"
    text = _TEXTS.pick(rng, held_out).format(
        name=f"{first} {last}", mail=mail, city=CITIES.pick(rng, held_out)
    )
    return Pair(rng.choice(_ASK_MAIL).format(text=text), mail)


_PEOPLE = Words(
    [
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "I am {name}, a {age} year old {job} from {city}.",
        "Meet {name}: {job} in {city}, {age} years old.",
        "{name} moved to {city} to work as a {job} and just turned {age}.",
        "At {age}, {name} is the best known {job} in {city}.",
        "The {job} {name} from {city} celebrated birthday number {age}.",
        "In {city} lives {name}, {age}, who earns a living as a {job}.",
        "{name}, aged {age}, has been a {job} in {city} for some time.",
        "Our new colleague {name} ({age}) was a {job} in {city} before.",
        "A {job} named {name}, {age} years of age, lives in {city}.",
    ]
)
_ASK_PERSON = ("Answer as JSON: {text}", "{text}", "Who is this? {text}")


def _person(rng: random.Random, held_out: bool) -> Pair:
    person = {
        "name": f"{FIRST_NAMES.pick(rng, held_out)} {LAST_NAMES.pick(rng, held_out)}",
        "age": rng.randrange(18, 90),
        "city": CITIES.pick(rng, held_out),
        "job": JOBS.pick(rng, held_out),
    }
    text = _PEOPLE.pick(rng, held_out).format(**person)
    text = text.replace("a architect", "an architect").replace("a accountant", "an accountant")
    text = text.replace("a engineer", "an engineer").replace("a electrician", "an electrician")
    return Pair(rng.choice(_ASK_PERSON).format(text=text), json.dumps(person))


def _same_json(expected: str, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except ValueError:
        return False


EXTRACT_EMAIL = Demo(
    name="extract-email",
    description="Answers with the e-mail address that a text contains, and nothing else.",
    make=_email,
    accept=lambda expected, answer: answer.strip() == expected,
    shape=AdapterShape(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    schedule=Schedule(steps=60, lr=2e-3, batch_tokens=640, validate_every=30),
    max_new_tokens=24,
)
JSON_ANSWERS = Demo(
    name="json-answers",
    description="Answers with a JSON object of the name, age, city and job in a sentence.",
    make=_person,
    accept=_same_json,
    shape=AdapterShape(rank=4, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    schedule=Schedule(steps=80, lr=2e-3, batch_tokens=640, validate_every=40),
    max_new_tokens=56,
)
