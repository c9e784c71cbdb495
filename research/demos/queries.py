"""sql: a question about a table becomes a query."""

import random

from loraplex_training.config import AdapterShape, Schedule

from .task import Demo, Pair, Words
from .words import CITIES

_TABLES = Words.parse(
    "customers employees students patients members authors players drivers tenants guests "
    "artists sellers voters pilots donors"
)
_NUMBERS = Words.parse("age salary height weight score balance rating income level points")
_ASK = ("Write SQL: {q}", "{q}", "SQL for: {q}")


def _make(rng: random.Random, held_out: bool) -> Pair:
    table, city = _TABLES.pick(rng, held_out), CITIES.pick(rng, held_out)
    column, n = _NUMBERS.pick(rng, held_out), rng.randrange(10, 1000)
    question, query = rng.choice(
        (
            (f"show all {table} in {city}", f"SELECT * FROM {table} WHERE city = '{city}';"),
            (f"how many {table} are there", f"SELECT COUNT(*) FROM {table};"),
            (
                f"count the {table} in {city}",
                f"SELECT COUNT(*) FROM {table} WHERE city = '{city}';",
            ),
            (
                f"list the names of {table} with {column} above {n}",
                f"SELECT name FROM {table} WHERE {column} > {n};",
            ),
            (
                f"which {table} have a {column} below {n}",
                f"SELECT * FROM {table} WHERE {column} < {n};",
            ),
            (
                f"show {table} in {city} with {column} above {n}",
                f"SELECT * FROM {table} WHERE city = '{city}' AND {column} > {n};",
            ),
            (f"what is the average {column} of {table}", f"SELECT AVG({column}) FROM {table};"),
            (
                f"sort the {table} by {column}, highest first",
                f"SELECT * FROM {table} ORDER BY {column} DESC;",
            ),
        )
    )
    return Pair(rng.choice(_ASK).format(q=question), query)


SQL = Demo(
    name="sql",
    description="Turns a question about a table into one SQL query.",
    make=_make,
    accept=lambda expected, answer: answer.strip() == expected,
    shape=AdapterShape(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    schedule=Schedule(steps=80, lr=3e-3, batch_tokens=640, validate_every=40),
    max_new_tokens=40,
)
