"""On lists of five to seven items."""

import random

from ..draws import Operation
from ..rows import Row, series, table
from ..words import pool, pool_part


def _items(rng: random.Random, split: str) -> tuple[str, list[str]]:
    """Longest and shortest are unique."""
    while True:
        kind = rng.choice(("foods", "cities", "nouns"))
        names = [name for name in pool_part(pool(kind), split) if " " not in name]
        items = rng.sample(names, rng.randint(5, 7))
        lengths = sorted(len(item) for item in items)
        if lengths[0] < lengths[1] and lengths[-2] < lengths[-1]:
            return ", ".join(items), items


def _with_doubles(rng: random.Random, split: str) -> tuple[str, list[str]]:
    _, items = _items(rng, split)
    items.insert(rng.randrange(len(items)), items[rng.randrange(len(items))])
    return ", ".join(items), items


def _lines(rng: random.Random, split: str) -> tuple[str, list[str]]:
    _, items = _items(rng, split)
    return "\n".join(f"- {item}" for item in items), items


def _joined(mark: str, told: str, test: str) -> Row:
    return Row(
        lambda items: mark.join(items),
        (f"separate the items with {told}", f"join the list with {told}"),
        (f"the items with {test} in place of the commas",),
    )


LISTINGS: dict[str, Operation] = {
    **series(
        "lists",
        _items,
        "item-at",
        (3, 4, 5),
        Row(
            lambda items, n: items[n - 1],
            ("the {nth} item of the list", "pick item number {n}"),
            ("which item comes {nth}",),
        ),
    ),
    **series(
        "lists",
        _items,
        "item-from-end",
        (2, 3, 4),
        Row(
            lambda items, n: items[-n],
            ("the {nth} item from the end", "pick item number {n} counted from behind"),
            ("which item is {nth} from the back",),
        ),
    ),
    **series(
        "lists",
        _items,
        "first-items",
        (2, 3, 4),
        Row(
            lambda items, n: ", ".join(items[:n]),
            ("the first {word} items", "shorten the list to {n} items"),
            ("the top {word} of the list",),
        ),
    ),
    **series(
        "lists",
        _items,
        "last-items",
        (2, 3, 4),
        Row(
            lambda items, n: ", ".join(items[-n:]),
            ("the last {word} items", "keep the final {n} items"),
            ("the bottom {word} of the list",),
        ),
    ),
    **series(
        "lists",
        _items,
        "drop-items",
        (1, 2, 3),
        Row(
            lambda items, n: ", ".join(items[n:]),
            ("the list without its first {word} item{s}", "skip {word} item{s} at the start"),
            ("whatever follows the first {word} item{s}",),
        ),
    ),
    **series(
        "lists",
        _items,
        "rotate-items",
        (1, 2, 3),
        Row(
            lambda items, n: ", ".join(items[n:] + items[:n]),
            ("move the first {word} item{s} to the end", "rotate the list left by {n}"),
            ("the list with its leading {word} item{s} put last",),
        ),
    ),
    **table(
        "lists",
        _items,
        {
            "list-sort": Row(
                lambda items: ", ".join(sorted(items)),
                ("sort the list alphabetically", "the items from a to z"),
                ("put the items into dictionary order",),
            ),
            "list-sort-down": Row(
                lambda items: ", ".join(sorted(items, reverse=True)),
                ("sort the list from z to a", "the items in reverse alphabetical order"),
                ("put the items into backward dictionary order",),
            ),
            "list-longest": Row(
                lambda items: max(items, key=len),
                ("the longest item", "find the item with the most letters"),
                ("which item has the longest name",),
            ),
            "list-shortest": Row(
                lambda items: min(items, key=len),
                ("the shortest item", "find the item with the fewest letters"),
                ("which item has the shortest name",),
            ),
            "list-without-last": Row(
                lambda items: ", ".join(items[:-1]),
                ("the list without its last item", "drop the final item"),
                ("everything but the closing item",),
            ),
            "list-swap-ends": Row(
                lambda items: ", ".join([items[-1], *items[1:-1], items[0]]),
                ("swap the first and the last item", "exchange the outer items"),
                ("the list with both end items traded",),
            ),
            "list-odd": Row(
                lambda items: ", ".join(items[::2]),
                ("every other item, starting with the first", "keep items one, three, five"),
                ("the items in odd positions",),
            ),
            "list-and": Row(
                lambda items: f"{', '.join(items[:-1])} and {items[-1]}",
                ("write the list with and before the last item", "read the list out with an and"),
                ("the enumeration as in a sentence, and instead of the last comma",),
            ),
            "list-or": Row(
                lambda items: f"{', '.join(items[:-1])} or {items[-1]}",
                ("write the list with or before the last item", "offer the items as a choice"),
                ("the enumeration with or instead of the last comma",),
            ),
            "list-capitalised": Row(
                lambda items: ", ".join(item.capitalize() for item in items),
                ("capitalise every item", "the items with capital first letters"),
                ("each item starting in upper case",),
            ),
            "list-initials": Row(
                lambda items: ", ".join(item[0].upper() for item in items),
                ("the first letter of each item, as a capital", "shorten each item to a capital"),
                ("the initials of the items",),
            ),
            "list-lengths": Row(
                lambda items: ", ".join(str(len(item)) for item in items),
                ("the number of letters of each item", "replace every item by its length"),
                ("how long each item is",),
            ),
            "list-etc": Row(
                lambda items: f"{items[0]}, {items[1]}, etc.",
                ("shorten the list to two items and etc.", "name two items, then write etc."),
                ("the first pair of items followed by etc.",),
            ),
            "list-pairs": Row(
                lambda items: f"{items[0]} and {items[-1]}",
                ("the first and the last item with an and", "name only the outer items"),
                ("the opening item and the closing item",),
            ),
            "list-add-salt": Row(
                lambda items: ", ".join([*items, "salt"]),
                ("add salt to the end of the list", "append the item salt"),
                ("the same list with salt as its last item",),
            ),
            "list-start-milk": Row(
                lambda items: ", ".join(["milk", *items]),
                ("put milk at the front of the list", "prepend the item milk"),
                ("the same list with milk as its first item",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "caps"),
    ),
    **table(
        "lists",
        _with_doubles,
        {
            "list-unique": Row(
                lambda items: ", ".join(dict.fromkeys(items)),
                ("remove the duplicate from the list", "keep each item only once"),
                ("the list without its repeated item",),
            ),
            "list-double": Row(
                lambda items: next(item for item in items if items.count(item) > 1),
                ("the item that is listed twice", "find the duplicate"),
                ("which item is repeated",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "caps"),
    ),
    **table(
        "list-marks",
        _items,
        {
            "list-semicolons": _joined("; ", "semicolons", "a semicolon"),
            "list-pipes": _joined(" | ", "pipes", "a vertical bar"),
            "list-slashes": _joined(" / ", "slashes", "an oblique stroke"),
            "list-plus": _joined(" + ", "plus signs", "a plus"),
            "list-ampersands": _joined(" & ", "ampersands", "an & sign"),
            "list-arrows": _joined(" -> ", "arrows", "an arrow ->"),
            "list-spaces": _joined(" ", "single spaces", "a blank"),
            "list-lines": _joined("\n", "line breaks", "a new line"),
            "list-bullets": Row(
                lambda items: "\n".join(f"- {item}" for item in items),
                ("write the list as bullets with hyphens", "one line with a hyphen for each item"),
                ("the items as a Markdown bullet list",),
            ),
            "list-numbers": Row(
                lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
                ("number the items line by line", "one line with number and dot for each item"),
                ("the items as a Markdown numbered list",),
            ),
            "list-check-boxes": Row(
                lambda items: "\n".join(f"[ ] {item}" for item in items),
                ("write the list as check boxes [ ]", "one line with an empty box for each item"),
                ("the items as a list to tick off",),
            ),
            "list-brackets": Row(
                lambda items: f"[{', '.join(items)}]",
                ("put the list in square brackets", "write it as [a, b, c]"),
                ("the items as an array without quotes",),
            ),
            "list-set": Row(
                lambda items: f"{{{', '.join(items)}}}",
                ("put the list in curly braces", "write the items as a set"),
                ("the items in mathematical set notation",),
            ),
            "list-counted": Row(
                lambda items: f"{len(items)}: {', '.join(items)}",
                ("put the number of items and a colon before the list", "prefix the list's length"),
                ("the list led by its count",),
            ),
        },
        formats=("plain", "caps"),
    ),
    **table(
        "list-marks",
        _lines,
        {
            "bullets-to-commas": Row(
                lambda items: ", ".join(items),
                ("turn the bullets into a comma list", "write the bullet points on one line"),
                ("the bullet points separated by commas",),
            ),
            "bullets-count": Row(
                lambda items: str(len(items)),
                ("the number of bullet points", "count the bullets"),
                ("how many bullet points there are",),
            ),
            "bullets-first": Row(
                lambda items: items[0],
                ("the text of the first bullet", "copy the first bullet point without its hyphen"),
                ("what the topmost bullet says",),
            ),
            "bullets-last": Row(
                lambda items: items[-1],
                ("the text of the last bullet", "copy the final bullet point without its hyphen"),
                ("what the bottom bullet says",),
            ),
        },
    ),
}
