"""A field taken out of a structured line: addresses, orders, paths, logs, versions, tables."""

import random
from typing import NamedTuple

from ..draws import Operation, draw_day, draw_name, draw_number
from ..rows import Row, series, table
from ..words import pool, pool_part

_EXACT = ("plain", "json", "quotes", "tag", "sentence")  # where capitals would be another value
_ENDINGS = ("txt", "pdf", "csv", "png", "docx", "md", "zip", "html")
_LEVELS = ("INFO", "WARNING", "ERROR", "DEBUG")


class _Mail(NamedTuple):
    first: str
    last: str
    host: str
    top: str


class _Path(NamedTuple):
    folders: list[str]
    name: str
    ending: str


class _Order(NamedTuple):
    number: int
    amount: int
    item: str
    price: int
    city: str


class _Log(NamedTuple):
    day: str
    level: str
    part: str
    text: str


def _common(rng: random.Random, split: str, n: int) -> list[str]:
    return rng.sample(pool_part(pool("common"), split), n)


def _mail(rng: random.Random, split: str) -> tuple[str, _Mail]:
    first, last = draw_name(rng, split)
    top = rng.choice(("com", "org", "net", "de", "fr", "io"))
    mail = _Mail(first.lower(), last.lower(), _common(rng, split, 1)[0], top)
    return f"{mail.first}.{mail.last}@{mail.host}.{mail.top}", mail


def _path(rng: random.Random, split: str) -> tuple[str, _Path]:
    *folders, name = _common(rng, split, rng.randint(3, 4))
    path = _Path(folders, name, rng.choice(_ENDINGS))
    return f"/{'/'.join(folders)}/{name}.{path.ending}", path


def _url(rng: random.Random, split: str) -> tuple[str, tuple[str, str, str]]:
    """(scheme, host, path)."""
    host, *parts = _common(rng, split, rng.randint(2, 4))
    scheme, top = rng.choice(("http", "https")), rng.choice(("com", "org", "net", "io"))
    url = (scheme, f"{host}.{top}", "/" + "/".join(parts))
    return f"{url[0]}://{url[1]}{url[2]}", url


def _order(rng: random.Random, split: str) -> tuple[str, _Order]:
    order = _Order(
        draw_number(rng, split, 1000, 9999),
        rng.randint(2, 19),
        rng.choice(pool_part(pool("foods"), split)),
        rng.randint(2, 99),
        rng.choice(pool_part(pool("cities"), split)),
    )
    return (
        f"order {order.number}: {order.amount} x {order.item} at {order.price} EUR, "
        f"ship to {order.city}",
        order,
    )


def _log(rng: random.Random, split: str) -> tuple[str, _Log]:
    part, *words = _common(rng, split, 4)
    log = _Log(draw_day(rng, split).isoformat(), rng.choice(_LEVELS), part, " ".join(words))
    return f"{log.day} {log.level} [{log.part}] {log.text}", log


def _version(rng: random.Random, split: str) -> tuple[str, list[int]]:
    parts = [rng.randint(0, 19), draw_number(rng, split, 1, 99), rng.randint(0, 30)]
    return "v" + ".".join(map(str, parts)), parts


def _csv(rng: random.Random, split: str) -> tuple[str, list[str]]:
    words = _common(rng, split, rng.randint(5, 6))
    return ";".join(words), words


def _pairs(rng: random.Random, split: str) -> tuple[str, dict[str, str]]:
    values = dict(zip(("name", "city", "food", "tool"), _common(rng, split, 4), strict=True))
    keys = list(values)
    rng.shuffle(keys)
    return ", ".join(f"{key}={values[key]}" for key in keys), values


def _full_name(rng: random.Random, split: str) -> tuple[str, tuple[str, str, str]]:
    (first, last), (middle, _) = draw_name(rng, split), draw_name(rng, split)
    return f"{first} {middle} {last}", (first, middle, last)


def _of_pairs(key: str) -> Row:
    return Row(
        lambda values: values[key],
        (f"the value of {key}", f"read the value after {key}="),
        (f"what {key} is set to",),
    )


FIELDS: dict[str, Operation] = {
    **table(
        "addresses",
        _mail,
        {
            "mail-user": Row(
                lambda m: f"{m.first}.{m.last}",
                ("the part of the e-mail address before the @", "keep the mail user's name"),
                ("what stands left of the at sign",),
            ),
            "mail-domain": Row(
                lambda m: f"{m.host}.{m.top}",
                ("the domain of the e-mail address", "keep what follows the @"),
                ("what stands right of the at sign",),
            ),
            "mail-ending": Row(
                lambda m: m.top,
                ("the top-level domain of the address", "keep what follows the last dot"),
                ("the country code or ending of the mail address",),
            ),
            "mail-to-name": Row(
                lambda m: f"{m.first.capitalize()} {m.last.capitalize()}",
                ("the person's name from the e-mail address", "read first and last name off it"),
                ("whom the mail address belongs to, capitalised",),
            ),
            "mail-at": Row(
                lambda m: f"{m.first}.{m.last} at {m.host}.{m.top}",
                ("write at for the @", "hide the address from robots with at"),
                ("the address with the word at in it",),
            ),
            "mail-masked": Row(
                lambda m: f"{m.first[0]}***@{m.host}.{m.top}",
                ("mask the mail user after one letter with ***", "hide the user's name with ***"),
                ("the address as a form shows it, first letter and three stars",),
            ),
        },
        formats=_EXACT,
    ),
    **table(
        "paths",
        _path,
        {
            "file-name": Row(
                lambda p: f"{p.name}.{p.ending}",
                ("the file name with its ending", "drop the folders of the path"),
                ("what comes after the last slash",),
            ),
            "file-stem": Row(
                lambda p: p.name,
                ("the file name without its ending", "drop folders and ending"),
                ("the bare name of the file",),
            ),
            "file-ending": Row(
                lambda p: p.ending,
                ("the ending of the file, without a dot", "keep only the file's extension"),
                ("which kind of file it is, by its extension",),
            ),
            "file-folder": Row(
                lambda p: "/" + "/".join(p.folders),
                ("the folder of the file", "drop the file name from the path"),
                ("where the file lies, without a closing slash",),
            ),
            "path-top": Row(
                lambda p: p.folders[0],
                ("the first folder of the path", "keep the topmost folder"),
                ("which folder lies right below the root",),
            ),
            "path-crumbs": Row(
                lambda p: " > ".join([*p.folders, f"{p.name}.{p.ending}"]),
                ("the path as bread crumbs with >", "put > between the parts of the path"),
                ("the way to the file, as a web page shows it",),
            ),
            "path-depth": Row(
                lambda p: str(len(p.folders)),
                ("the number of folders in the path", "count the folders"),
                ("how deep the file lies",),
            ),
        },
        formats=_EXACT,
    ),
    **table(
        "web",
        _url,
        {
            "url-host": Row(
                lambda u: u[1],
                ("the host of the URL", "keep only the domain"),
                ("which site the link leads to",),
            ),
            "url-path": Row(
                lambda u: u[2],
                ("the path of the URL, with its slash", "drop scheme and host"),
                ("what the link asks of the site",),
            ),
            "url-scheme": Row(
                lambda u: u[0],
                ("the scheme of the URL", "say http or https"),
                ("by which protocol the link goes",),
            ),
            "url-bare": Row(
                lambda u: u[1] + u[2],
                ("the URL without its scheme", "drop what stands before the host"),
                ("the link as one reads it out",),
            ),
            "url-last": Row(
                lambda u: u[2].rpartition("/")[2],
                ("the last part of the path", "keep what follows the last slash"),
                ("the slug at the link's end",),
            ),
        },
        formats=_EXACT,
    ),
    **table(
        "orders",
        _order,
        {
            "order-number": Row(
                lambda o: str(o.number),
                ("the number of the order", "extract the order number"),
                ("which order this is",),
            ),
            "order-amount": Row(
                lambda o: str(o.amount),
                ("the ordered quantity", "extract how many pieces are ordered"),
                ("how many pieces they want",),
            ),
            "order-item": Row(
                lambda o: o.item,
                ("the ordered item", "extract what is ordered"),
                ("which goods they want",),
            ),
            "order-price": Row(
                lambda o: str(o.price),
                ("the price of one piece, as a number", "extract the unit price"),
                ("what each costs, in figures",),
            ),
            "order-total": Row(
                lambda o: str(o.amount * o.price),
                ("the total of the order, as a number", "multiply quantity and price"),
                ("what the whole order costs, in figures",),
            ),
            "order-city": Row(
                lambda o: o.city,
                ("the city that the order goes to", "extract the destination"),
                ("where the goods are shipped",),
            ),
            "order-short": Row(
                lambda o: f"#{o.number} {o.city}",
                ("# with the order number, then the city", "shorten it to number and city"),
                ("the order's label: hash, number, destination",),
            ),
        },
        formats=_EXACT,
    ),
    **table(
        "logs",
        _log,
        {
            "log-level": Row(
                lambda x: x.level,
                ("the level of the log line", "extract the severity"),
                ("how serious the entry is",),
            ),
            "log-day": Row(
                lambda x: x.day,
                ("the date of the log line", "extract the date"),
                ("when the entry was written",),
            ),
            "log-part": Row(
                lambda x: x.part,
                ("the component in square brackets", "extract the component"),
                ("which part of the program wrote it",),
            ),
            "log-text": Row(
                lambda x: x.text,
                ("the message of the log line", "drop date, level and component"),
                ("what the entry says",),
            ),
            "log-alarm": Row(
                lambda x: "yes" if x.level == "ERROR" else "no",
                ("whether it is an error, yes or no", "say yes if the level is ERROR"),
                ("if somebody should be woken: yes for ERROR only",),
            ),
        },
        formats=_EXACT,
    ),
    **table(
        "versions",
        _version,
        {
            "version-major": Row(
                lambda v: str(v[0]),
                ("the major version", "keep the first number of the version"),
                ("which generation of the release it is",),
            ),
            "version-minor": Row(
                lambda v: str(v[1]),
                ("the minor version", "keep the middle number of the version"),
                ("the number between the two dots",),
            ),
            "version-bare": Row(
                lambda v: ".".join(map(str, v)),
                ("the version without the v", "drop the leading v"),
                ("the release in plain numbers",),
            ),
            "next-patch": Row(
                lambda v: f"v{v[0]}.{v[1]}.{v[2] + 1}",
                ("the next patch version", "raise the last number of the version by one"),
                ("what the coming bug-fix release is called",),
            ),
            "next-minor": Row(
                lambda v: f"v{v[0]}.{v[1] + 1}.0",
                ("the next minor version", "raise the middle number, zero the last"),
                ("what the coming feature release is called",),
            ),
            "next-major": Row(
                lambda v: f"v{v[0] + 1}.0.0",
                ("the next major version", "raise the first number, zero the others"),
                ("what the coming breaking release is called",),
            ),
        },
        formats=_EXACT,
    ),
    **series(
        "tables",
        _csv,
        "column",
        (1, 2, 3, 4, 5),
        Row(
            lambda cells, n: cells[n - 1],
            ("the {nth} column of the line", "read cell number {n}"),
            ("what the {nth} field between semicolons holds",),
        ),
    ),
    **table(
        "tables",
        _csv,
        {
            "columns-count": Row(
                lambda cells: str(len(cells)),
                ("the number of columns", "count the cells of the line"),
                ("how many fields the line has",),
            ),
            "semicolons-to-tabs": Row(
                lambda cells: "\t".join(cells),
                ("separate the cells with tabs", "convert the line from CSV to TSV"),
                ("the fields with a tabulator between",),
            ),
            "semicolons-to-markdown": Row(
                lambda cells: f"| {' | '.join(cells)} |",
                ("write the line as a Markdown table row", "pipes around and between the cells"),
                ("the fields as one row of a Markdown table",),
            ),
        },
        formats=("plain",),
    ),
    **table(
        "settings",
        _pairs,
        {f"value-{key}": _of_pairs(key) for key in ("name", "city", "food", "tool")},
    ),
    **table(
        "names",
        _full_name,
        {
            "middle-name": Row(
                lambda n: n[1],
                ("the middle name", "extract the second of the three names"),
                ("which name stands between the others",),
            ),
            "forename": Row(
                lambda n: n[0],
                ("the first name", "keep the given name alone"),
                ("what friends call this person",),
            ),
            "middle-initial": Row(
                lambda n: f"{n[0]} {n[1][0]}. {n[2]}",
                ("the name with its middle name as an initial", "abbreviate the middle name"),
                ("the name as on an American cover page",),
            ),
            "no-middle": Row(
                lambda n: f"{n[0]} {n[2]}",
                ("the name without the middle name", "drop the middle name"),
                ("the person's two outer names",),
            ),
            "citation-name": Row(
                lambda n: f"{n[2]}, {n[0][0]}. {n[1][0]}.",
                ("surname, then both initials, as in a citation", "cite the author"),
                ("how a reference list prints this author",),
            ),
            "three-initials": Row(
                lambda n: "".join(part[0] for part in n),
                ("the three initials without dots", "join the first letters of the names"),
                ("the monogram of three letters",),
            ),
        },
        formats=_EXACT,
    ),
}
