"""The operations of the chores: each turns a drawn input into its one right bare answer."""

import random
from collections.abc import Callable
from datetime import date

from .draws import Drawn, Operation, draw_day, draw_foods, draw_name, draw_number
from .words import WEEKDAYS, pool, pool_part

__all__ = ["LANGUAGES", "OPERATIONS", "Operation"]

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}

_LONG_DATE = {  # CLDR patterns, written out so that a new CLDR release changes no task
    "en": "d MMMM y",
    "de": "d. MMMM y",
    "fr": "d MMMM y",
    "es": "d 'de' MMMM 'de' y",
    "it": "d MMMM y",
}


def _long_date(rng: random.Random, split: str, language: str) -> Drawn:
    from babel.dates import format_date

    day: date = draw_day(rng, split)
    answer = format_date(day, format=_LONG_DATE[language], locale=language)
    return day.isoformat(), str(answer)


def _on_name(answer: Callable[[str, str], str]) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        first, last = draw_name(rng, split)
        return f"{first} {last}", answer(first, last)

    return draw


def _on_list(answer: Callable[[list[str]], str]) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        words = draw_foods(rng, split)
        return ", ".join(words), answer(words)

    return draw


def _plural(rng: random.Random, split: str, language: str) -> Drawn:
    from lemminflect import getInflection

    word = rng.choice(pool_part(pool("nouns"), split))
    return word, str(getInflection(word, tag="NNS")[0])


_RECORDS = (
    "{name} from {city} paid {amount} euros on {weekday}.",
    "On {weekday}, {name} sent {amount} dollars to {city}.",
    "{weekday}: {name} bought {amount} books in {city}.",
    "We shipped {amount} boxes to {name} in {city} on {weekday}.",
)


def _record_weekday(rng: random.Random, split: str, language: str) -> Drawn:
    first, last = draw_name(rng, split)
    city = rng.choice(pool_part(pool("cities"), split))
    amount = draw_number(rng, split, 2, 999)
    weekday = rng.choice(WEEKDAYS)
    template = rng.choice(_RECORDS)
    record = template.format(name=f"{first} {last}", city=city, amount=amount, weekday=weekday)
    return record, weekday


def _minutes(rng: random.Random, split: str, language: str) -> Drawn:
    number = draw_number(rng, split, 61, 999)
    return f"{number} minutes", f"{number // 60} h {number % 60} min"


def _colon_time(rng: random.Random, split: str, language: str) -> Drawn:
    hour, minute = rng.randint(13, 23), draw_number(rng, split, 10, 59)
    return f"{hour}:{minute}", f"{hour - 12}:{minute} pm"


OPERATIONS: dict[str, Operation] = {
    "date": Operation(
        draw=_long_date,
        wordings=(
            "Write the date in {language} with the month's name",
            "Rewrite the ISO date as a long date in {language}",
            "Convert the date to {language} long form",
            "Spell out the month of this date in {language}",
            "Format the date the {language} way, with the month in words",
            "Turn the ISO date into a date in {language}",
            "Express the date in {language}",
            "Give the {language} long date",
            "Write this calendar date out in {language}",
            "Change the numeric date into {language} text",
        ),
        test_wordings=(
            "How would one write this date in {language}? Use the long form",
            "Render the date in {language} with a written month",
            "Translate the ISO date into a long date in {language}",
            "Put the date in the long {language} style",
            "I need this date in written {language}",
        ),
    ),
    "last-first": Operation(
        draw=_on_name(lambda first, last: f"{last}, {first}"),
        wordings=(
            "Write the surname first, then a comma and the first name",
            "Reorder the name to last name, first name",
            "Invert the name as in a library catalogue",
            "Put the family name before the given name, separated by a comma",
            "Format the name as Last, First",
            "Rewrite the name with the surname in front",
            "Swap the first and last name and put a comma between",
            "Turn the name into surname, forename",
            "List the person by last name first",
            "Give the name in the order last, first",
        ),
        test_wordings=(
            "Sort-style name: surname, given name",
            "Flip the name so the last name leads, with a comma",
            "Write this person as in a phone book, family name first",
            "Move the surname to the front with a comma",
            "Name in Last, First order",
        ),
    ),
    "initials": Operation(
        draw=_on_name(lambda first, last: f"{first[0]}.{last[0]}."),
        wordings=(
            "Give the person's initials",
            "Write the initials of the name with dots",
            "Shorten the name to its initials",
            "Reduce the name to first letters",
            "Abbreviate the name to initials",
            "Take the first letter of each name and put dots after them",
            "Turn the full name into initials",
            "What are the initials of this person",
            "Name to initials",
            "Write only the initials",
        ),
        test_wordings=(
            "Initialise the name, as in J.S.",
            "State this person's initials",
            "Condense the name into its initial letters",
            "Which initials does this name have",
            "Monogram of the name, with dots",
        ),
    ),
    "list-reverse": Operation(
        draw=_on_list(lambda words: ", ".join(reversed(words))),
        wordings=(
            "Reverse the list",
            "Write the items in reverse order",
            "List the items backwards",
            "Turn the order of the list around",
            "Give the list from last to first",
            "Flip the order of the items",
            "Invert the list's order",
            "Put the items in the opposite order",
            "Repeat the list from the end to the start",
            "Output the list reversed",
        ),
        test_wordings=(
            "Back to front: write the list",
            "Mirror the order of the listed items",
            "Order the items from the end to the beginning",
            "Read the list in reverse",
            "The same list, reversed",
        ),
    ),
    "list-count": Operation(
        draw=_on_list(lambda words: str(len(words))),
        wordings=(
            "Count the items of the list",
            "How many items are in the list",
            "Give the number of list entries",
            "State the length of the list",
            "Tell how many things are listed",
            "Write the count of the elements",
            "Count how many words are listed",
            "Return the size of the list",
            "Number of items in the list",
            "Determine how long the list is",
        ),
        test_wordings=(
            "What is the list's length",
            "How many entries does the list hold",
            "Total number of listed things",
            "Say how many elements there are",
            "Tally the list",
        ),
    ),
    "record-weekday": Operation(
        draw=_record_weekday,
        wordings=(
            "Extract the day of the week from the sentence",
            "Find the weekday in the text",
            "On which day was it? Give the weekday in the sentence",
            "Pull the weekday out of the text",
            "Return the day named in the message",
            "Get the weekday from the record",
        ),
        test_wordings=(
            "Tell me which day of the week appears in the sentence",
            "Spot the weekday in this message",
            "From the sentence, take out the day",
        ),
    ),
    "plural": Operation(
        draw=_plural,
        wordings=(
            "Write the plural of the noun",
            "Give the plural form",
            "Turn the singular noun into the plural",
            "Pluralise the word",
            "What is the plural of this word",
            "Make the noun plural",
            "Convert the noun to its plural",
            "Form the plural of the word",
            "More than one of these: give the word",
            "Singular to plural",
        ),
        test_wordings=(
            "Change the noun so that it means several",
            "State the plural",
            "Put this noun in the plural",
            "How do you say many of this thing",
            "I need the plural form of the noun",
        ),
    ),
    "minutes": Operation(
        draw=_minutes,
        wordings=(
            "Convert the minutes to hours and minutes",
            "Write the duration in hours and minutes",
            "How many hours and minutes is that",
            "Change minutes into h and min",
            "Express the time span in hours and minutes",
            "Turn the number of minutes into hours and minutes",
        ),
        test_wordings=(
            "Split the minutes into hours and minutes",
            "Duration as hours plus minutes",
            "Minutes to hours",
        ),
    ),
    "clock": Operation(
        draw=_colon_time,
        wordings=(
            "Convert the 24-hour time to the 12-hour clock",
            "Write the time with pm",
            "Change the time to 12-hour format",
            "Turn the military time into pm time",
            "Express the time on the twelve-hour clock",
            "Rewrite the clock time in am/pm style",
        ),
        test_wordings=(
            "Give the time in am/pm notation",
            "Twelve-hour version of the time",
            "From 24 h to 12 h",
        ),
    ),
}
