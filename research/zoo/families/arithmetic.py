"""On one number, two numbers, or a list of numbers."""

import random
from math import prod

from ..draws import Operation, draw_number
from ..rows import Row, series, table

_FORMATS = ("plain", "json", "quotes", "tag", "sentence")  # capitals change no digit


def _number(rng: random.Random, split: str) -> tuple[str, int]:
    number = draw_number(rng, split, 21, 999)
    return str(number), number


def _large(rng: random.Random, split: str) -> tuple[str, int]:
    number = draw_number(rng, split, 1_001, 99_999)
    return str(number), number


def _pair(rng: random.Random, split: str) -> tuple[str, list[int]]:
    """The first is larger."""
    pair = [draw_number(rng, split, 11, 99), draw_number(rng, split, 2, 99)]
    while pair[0] <= pair[1]:
        pair[1] = draw_number(rng, split, 2, 99)
    return f"{pair[0]} and {pair[1]}", pair


def _list(rng: random.Random, split: str) -> tuple[str, list[int]]:
    """Four or five, all different."""
    numbers = list(dict.fromkeys(draw_number(rng, split, 1, 99) for _ in range(9)))
    numbers = numbers[: rng.randint(4, 5)]
    return ", ".join(map(str, numbers)), numbers


def _decimal(rng: random.Random, split: str) -> tuple[str, tuple[int, int]]:
    """(whole, hundredths)."""
    whole, part = draw_number(rng, split, 2, 999), rng.randint(1, 99)
    return f"{whole}.{part:02d}", (whole, part)


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


ARITHMETIC: dict[str, Operation] = {
    **series(
        "arithmetic",
        _number,
        "add",
        (1, 2, 3, 5, 10, 20, 50, 100),
        Row(
            lambda x, n: str(x + n),
            ("add {n} to the number", "the number plus {n}"),
            ("the sum of the number and {n}", "increase it by {n}"),
        ),
        formats=_FORMATS,
    ),
    **series(
        "arithmetic",
        _number,
        "subtract",
        (1, 2, 5, 10),
        Row(
            lambda x, n: str(x - n),
            ("subtract {n} from the number", "the number minus {n}"),
            ("what is left of the number after taking {n} away", "decrease it by {n}"),
        ),
        formats=_FORMATS,
    ),
    **series(
        "arithmetic",
        _number,
        "times",
        (2, 3, 5, 10, 100),
        Row(
            lambda x, n: str(x * n),
            ("multiply the number by {n}", "the number times {n}"),
            ("{n} times this number", "the {n}-fold of the number"),
        ),
        formats=_FORMATS,
    ),
    **series(
        "arithmetic",
        _large,
        "round-to",
        (10, 100, 1000),
        Row(
            lambda x, n: str((x + n // 2) // n * n),
            ("round the number to the nearest {n}", "the closest multiple of {n}, halves up"),
            ("approximate it to full {n}s",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "arithmetic",
        _large,
        "floor-to",
        (10, 100, 1000),
        Row(
            lambda x, n: str(x // n * n),
            ("round the number down to a multiple of {n}", "cut it down to full {n}s"),
            ("the largest multiple of {n} that is not above it",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "arithmetic",
        _number,
        "remainder",
        (2, 3, 5, 10),
        Row(
            lambda x, n: str(x % n),
            ("the remainder after dividing by {n}", "the number modulo {n}"),
            ("what remains when {n} is divided out",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "digits",
        _number,
        "zero-pad",
        (4, 5, 6, 8),
        Row(
            lambda x, n: str(x).zfill(n),
            ("pad the number with zeros to {n} digits", "write it with {n} digits, zeros first"),
            ("fill up with leading zeros until there are {n} figures",),
        ),
        formats=_FORMATS,
    ),
    **table(
        "arithmetic",
        _pair,
        {
            "sum-of-two": Row(
                lambda p: str(sum(p)),
                ("the sum of the two numbers", "add both numbers"),
                ("what the numbers make together",),
            ),
            "difference": Row(
                lambda p: str(p[0] - p[1]),
                ("the first number minus the second", "subtract the second from the first"),
                ("how much larger the first number is",),
            ),
            "product": Row(
                lambda p: str(prod(p)),
                ("the product of the two numbers", "multiply both numbers"),
                ("one number times the other",),
            ),
            "as-addition": Row(
                lambda p: f"{p[0]} + {p[1]} = {sum(p)}",
                ("write the addition with its result", "both numbers as an equation with plus"),
                ("the full sum, with plus and equals signs",),
            ),
            "as-comparison": Row(
                lambda p: f"{p[0]} > {p[1]}",
                ("compare the numbers with a > sign", "write that the first is greater"),
                ("the inequality between the numbers",),
            ),
            "as-fraction": Row(
                lambda p: f"{p[0]}/{p[1]}",
                ("the first over the second as a fraction", "put a fraction bar between them"),
                ("both numbers as numerator and denominator",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "number-lists",
        _list,
        {
            "numbers-sum": Row(
                lambda x: str(sum(x)),
                ("the sum of all numbers", "add the numbers up"),
                ("the total of the listed numbers",),
            ),
            "numbers-max": Row(
                lambda x: str(max(x)),
                ("the largest number of the list", "find the maximum"),
                ("which listed number is greatest",),
            ),
            "numbers-min": Row(
                lambda x: str(min(x)),
                ("the smallest number of the list", "find the minimum"),
                ("which listed number is least",),
            ),
            "numbers-sort": Row(
                lambda x: _joined(sorted(x)),
                ("sort the numbers, smallest first", "the numbers in ascending order"),
                ("arrange the numbers from low to high",),
            ),
            "numbers-sort-down": Row(
                lambda x: _joined(sorted(x, reverse=True)),
                ("sort the numbers, largest first", "the numbers in descending order"),
                ("arrange the numbers from high to low",),
            ),
            "numbers-even": Row(
                lambda x: _joined([n for n in x if n % 2 == 0]) or "none",
                ("keep the even numbers, or say none", "the even ones; none if there are none"),
                ("which listed numbers are divisible by two (none if none)",),
            ),
            "numbers-odd": Row(
                lambda x: _joined([n for n in x if n % 2]) or "none",
                ("keep the odd numbers, or say none", "the odd ones; none if there are none"),
                ("which listed numbers are not divisible by two (none if none)",),
            ),
            "numbers-plus-one": Row(
                lambda x: _joined([n + 1 for n in x]),
                ("add one to every number", "each number plus one"),
                ("the list with all numbers raised by 1",),
            ),
            "numbers-doubled": Row(
                lambda x: _joined([2 * n for n in x]),
                ("double every number", "each number times two"),
                ("the list with twice every number",),
            ),
            "numbers-span": Row(
                lambda x: f"{min(x)}-{max(x)}",
                ("the range of the numbers as low-high", "smallest and largest with a hyphen"),
                ("from which to which number the list reaches",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "digits",
        _number,
        {
            "digit-sum": Row(
                lambda x: str(sum(map(int, str(x)))),
                ("the sum of the digits", "add the digits of the number"),
                ("the cross sum",),
            ),
            "digits-reverse": Row(
                lambda x: str(x)[::-1],
                ("reverse the digits", "the digits from last to first"),
                ("the number read from right to left",),
            ),
            "last-digit": Row(
                lambda x: str(x % 10),
                ("the last digit", "keep the units digit"),
                ("which digit the number ends with",),
            ),
            "first-digit": Row(
                lambda x: str(x)[0],
                ("the first digit", "keep the leading digit"),
                ("which digit the number starts with",),
            ),
            "digits-spaced": Row(
                lambda x: " ".join(str(x)),
                ("put spaces between the digits", "the digits one by one"),
                ("the figures set apart by blanks",),
            ),
            "half": Row(
                lambda x: f"{x // 2}.5" if x % 2 else str(x // 2),
                ("half of the number", "divide the number by two"),
                ("the number halved, .5 where needed",),
            ),
            "negative": Row(
                lambda x: f"-{x}",
                ("the number with a minus sign", "negate the number"),
                ("the opposite of the number",),
            ),
            "complement": Row(
                lambda x: str(1000 - x),
                ("what is missing to 1000", "subtract the number from 1000"),
                ("how much more makes a thousand",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "digits",
        _decimal,
        {
            "whole-part": Row(
                lambda x: str(x[0]),
                ("the part before the decimal point", "drop the decimals"),
                ("the integer part",),
            ),
            "decimal-part": Row(
                lambda x: f"{x[1]:02d}",
                ("the digits after the decimal point", "keep only the decimals"),
                ("the fractional figures",),
            ),
            "decimal-comma": Row(
                lambda x: f"{x[0]},{x[1]:02d}",
                ("write the decimal point as a comma", "the number in the German notation"),
                ("a comma in place of the point",),
            ),
            "to-cents": Row(
                lambda x: str(100 * x[0] + x[1]),
                ("the amount in cents", "convert the price to cents"),
                ("how many hundredths that is",),
            ),
        },
        formats=_FORMATS,
    ),
}
