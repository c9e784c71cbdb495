"""Numbers and dates in words, and the languages that the zoo knows."""

from datetime import date

LANGUAGES: dict[str, str] = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "sv": "Swedish",
    "da": "Danish",
    "pl": "Polish",
}

_LONG_DATE = {  # CLDR patterns, written out so that a new CLDR release changes no task
    "en": "d MMMM y",
    "de": "d. MMMM y",
    "fr": "d MMMM y",
    "es": "d 'de' MMMM 'de' y",
    "it": "d MMMM y",
}


def cardinal(number: int, language: str) -> str:
    """`cardinal(42, "de")` is "zweiundvierzig". Needs the extra `zoo`."""
    from num2words import num2words

    return str(num2words(number, lang=language))


def ordinal(number: int, language: str) -> str:
    """`ordinal(3, "en")` is "third"."""
    from num2words import num2words

    return str(num2words(number, lang=language, to="ordinal"))


def long_date(day: date, language: str) -> str:
    """`long_date(date(2024, 3, 17), "de")` is "17. März 2024"."""
    from babel.dates import format_date

    return str(format_date(day, format=_LONG_DATE[language], locale=language))
