"""Numbers in other notations, amounts with units and currencies, number words."""

import random

from ..draws import Drawn, Operation, draw_number
from ..languages import cardinal, ordinal
from ..rows import Input, Row, series, table

_FORMATS = ("plain", "json", "quotes", "tag", "sentence")
_ROMAN = (
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
)
_SPOKEN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl")


def _number(low: int, high: int) -> Input[int]:
    def draw(rng: random.Random, split: str) -> tuple[str, int]:
        number = draw_number(rng, split, low, high)
        return str(number), number

    return draw


def _with_unit(unit: str, low: int, high: int) -> Input[int]:
    def draw(rng: random.Random, split: str) -> tuple[str, int]:
        number = draw_number(rng, split, low, high)
        return f"{number} {unit}", number

    return draw


def _roman(number: int) -> str:
    text = ""
    for value, letters in (*_ROMAN, (1, "I")):
        text += letters * (number // value)
        number %= value
    return text


def _suffixed(number: int) -> str:
    teens = 10 <= number % 100 <= 20
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _thousands(mark: str, told: str, test: str) -> Row:
    return Row(
        lambda x: f"{x:,}".replace(",", mark),
        (f"group the thousands with {told}", f"write the number with {told} every three digits"),
        (f"the number made readable with {test}",),
    )


def _priced(template: str, told: str, test: str) -> Row:
    return Row(
        lambda x: template.format(x),
        (f"write the number as a price in {told}", f"the amount in {told}"),
        (f"the number as {test}",),
    )


def _converted(factor: int, unit: str, told: str, test: str) -> Row:
    return Row(
        lambda x: f"{x * factor} {unit}",
        (f"convert it to {told}", f"the same in {told}"),
        (f"how many {test} that is",),
    )


def _roman_numeral(rng: random.Random, split: str) -> tuple[str, int]:
    number = draw_number(rng, split, 1, 499)
    return _roman(number), number


def _in_language(
    answer_on: str, phrases: tuple[str, ...], tests: tuple[str, ...], high: int
) -> Operation:
    """`cardinal` words of an input that is `answer_on` number."""

    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        number = draw_number(rng, split, 2, high)
        if answer_on == "next":
            return str(number), cardinal(number + 1, language)
        if answer_on == "read":
            return cardinal(number, language), str(number)
        if answer_on == "tens":
            return str(number), cardinal(10 * number, language)
        return str(number), ordinal(number, language)

    return Operation("number-words", draw, phrases, tests, languages=_SPOKEN)


NOTATION: dict[str, Operation] = {
    "card-next": _in_language(
        "next",
        (
            "Write the number after this one in {language} words",
            "Add one and spell the result in {language}",
            "The next number, in {language} words",
            "Count one further and write it out in {language}",
        ),
        (
            "Which number follows? Spell it in {language}",
            "Give the successor as a {language} word",
        ),
        998,
    ),
    "card-read": _in_language(
        "read",
        (
            "Write the {language} number words as digits",
            "Turn the number spelled in {language} into figures",
            "Which number is this in {language}? Give the digits",
            "Convert the {language} words to a number",
        ),
        (
            "Decode the spelled {language} number into digits",
            "State the figure that these {language} words stand for",
        ),
        999,
    ),
    "card-tens": _in_language(
        "tens",
        (
            "Multiply by ten and spell the result in {language}",
            "Write ten times the number in {language} words",
            "The tenfold in {language} words",
            "Append a zero and say the number in {language}",
        ),
        (
            "Ten times as much, spelled in {language}",
            "Give the number with another zero, as a {language} word",
        ),
        499,
    ),
    **table(
        "notation",
        _number(1, 499),
        {
            "roman": Row(
                _roman,
                ("write the number in Roman numerals", "the Roman numeral"),
                ("how the Romans wrote this number",),
            ),
            "ordinal-suffix": Row(
                _suffixed,
                ("write the number as 1st, 2nd, 3rd", "add the English ordinal suffix"),
                ("the rank in figures with st, nd, rd or th",),
            ),
            "binary": Row(
                lambda x: f"{x:b}",
                ("write the number in binary", "the base-two digits"),
                ("the number as zeros and ones",),
            ),
            "hexadecimal": Row(
                lambda x: f"{x:x}",
                ("write the number in hexadecimal", "the base-sixteen digits in small letters"),
                ("the number as lower-case hex",),
            ),
            "octal": Row(
                lambda x: f"{x:o}",
                ("write the number in octal", "the base-eight digits"),
                ("the number in the octal system",),
            ),
            "percent": Row(
                lambda x: f"{x}%",
                ("write the number as a percentage", "put a percent sign after the number"),
                ("the number as per cent",),
            ),
            "hundredths": Row(
                lambda x: f"{x / 100:.2f}",
                ("divide by 100 and keep two decimals", "the percentage as a decimal number"),
                ("one hundredth of the number, two places",),
            ),
            "number-sign": Row(
                lambda x: f"No. {x}",
                ("put No. before the number", "write it as a running number with No."),
                ("the number labelled No.",),
            ),
            "tally": Row(
                lambda x: "|" * (x % 10 + 1),
                ("one more bar than the last digit says", "draw last digit plus one bars"),
                ("a tally of the last digit plus one",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "notation",
        _roman_numeral,
        {
            "from-roman": Row(
                str,
                ("convert the Roman numeral to digits", "read the Roman numeral"),
                ("which number the Roman letters stand for",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "notation",
        _number(10_000, 9_999_999),
        {
            "thousands-comma": _thousands(",", "commas", "English commas"),
            "thousands-dot": _thousands(".", "dots", "German dots"),
            "thousands-space": _thousands(" ", "spaces", "thin blanks"),
            "thousands-apostrophe": _thousands("'", "apostrophes", "Swiss apostrophes"),
            "in-thousands": Row(
                lambda x: f"{x // 1000}k",
                ("full thousands with a k", "shorten the number to thousands, cut off"),
                ("the number in k, the rest dropped",),
            ),
            "scientific": Row(
                lambda x: f"{x:.1e}".replace("e+0", "e"),
                ("scientific notation with one decimal, like 1.2e5", "write it as 1.2e5"),
                ("mantissa with one place and e exponent",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "currencies",
        _number(2, 9_999),
        {
            "dollars": _priced("${}", "dollars with the sign first", "a US price"),
            "euros": _priced("{} €", "euros with the sign last", "a price in the euro zone"),
            "pounds": _priced("£{}", "pounds with the sign first", "a British price"),
            "yen": _priced("¥{}", "yen with the sign first", "a Japanese price"),
            "euro-code": _priced("EUR {}", "euros with the code EUR first", "an ISO euro amount"),
            "dollar-cents": _priced("${}.00", "dollars with two zero cents", "a US price tag"),
            "francs": _priced("{} CHF", "Swiss francs, the code CHF last", "a Swiss bill"),
            "rupees": _priced("₹{}", "rupees with the sign first", "an Indian price"),
            "kronor": _priced("{} kr", "kronor, kr last", "a Swedish price"),
        },
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("kg", 2, 999),
        {"kg-to-g": _converted(1000, "g", "grams", "grams")},
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("m", 2, 999),
        {
            "m-to-cm": _converted(100, "cm", "centimetres", "centimetres"),
            "m-to-mm": _converted(1000, "mm", "millimetres", "millimetres"),
        },
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("km", 2, 999),
        {"km-to-m": _converted(1000, "m", "metres", "metres")},
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("l", 2, 999),
        {
            "l-to-ml": _converted(1000, "ml", "millilitres", "millilitres"),
            "l-to-cl": _converted(100, "cl", "centilitres", "centilitres"),
        },
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("h", 2, 499),
        {"h-to-min": _converted(60, "min", "minutes", "minutes")},
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("weeks", 2, 499),
        {"weeks-to-days": _converted(7, "days", "days", "days")},
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("dozen", 2, 499),
        {"dozen-to-pieces": _converted(12, "pieces", "pieces", "single pieces")},
        formats=_FORMATS,
    ),
    **table(
        "units",
        _with_unit("years", 2, 499),
        {"years-to-months": _converted(12, "months", "months", "months")},
        formats=_FORMATS,
    ),
    **series(
        "codes",
        _number(1, 9_999),
        "id-digits",
        (5, 6, 7),
        Row(
            lambda x, n: f"ID-{x:0{n}d}",
            ("an ID of {word} digits: ID-, then zeros, then the number", "ID- and {n} digits"),
            ("the number as an identifier ID- with {word} figures",),
        ),
        formats=_FORMATS,
    ),
}
