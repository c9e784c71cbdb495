"""The operations: each turns a drawn input into its one right bare answer.

Here are those of the shipped library and its test sets; `families` holds the many that followed.
"""

import random
from collections.abc import Callable
from datetime import date

from .draws import Drawn, Operation, draw_day, draw_foods, draw_name, draw_number
from .families import FAMILIES
from .languages import cardinal, long_date, ordinal
from .words import WEEKDAYS, pool, pool_part

__all__ = ["FIRST", "OPERATIONS", "Operation"]


def _inflected(tag: str) -> Callable[[str], str]:
    def inflect(word: str) -> str:
        from lemminflect import getInflection

        return str(getInflection(word, tag=tag)[0])

    return inflect


def _on_number(answer: Callable[[int, str], str], high: int) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        number = draw_number(rng, split, 1, high)
        return str(number), answer(number, language)

    return draw


def _on_day(answer: Callable[[date, str], str]) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        day = draw_day(rng, split)
        return day.isoformat(), answer(day, language)

    return draw


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


def _on_word(words: str, answer: Callable[[str], str]) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        word = rng.choice(pool_part(pool(words), split))
        return word, answer(word)

    return draw


def _on_record(field: str) -> Callable[..., Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        first, last = draw_name(rng, split)
        values = {
            "name": f"{first} {last}",
            "city": rng.choice(pool_part(pool("cities"), split)),
            "amount": str(draw_number(rng, split, 2, 999)),
            "weekday": rng.choice(WEEKDAYS),
        }
        template = rng.choice(_RECORDS)
        return template.format(**values), values[field]

    return draw


_RECORDS = (
    "{name} from {city} paid {amount} euros on {weekday}.",
    "On {weekday}, {name} sent {amount} dollars to {city}.",
    "{weekday}: {name} bought {amount} books in {city}.",
    "We shipped {amount} boxes to {name} in {city} on {weekday}.",
)

_POSITIVE = ("wonderful", "excellent", "lovely", "great", "superb", "charming", "delightful")
_NEGATIVE = ("awful", "terrible", "boring", "dreadful", "poor", "horrible", "disappointing")
_THINGS = ("film", "meal", "hotel", "book", "concert", "service", "trip", "lesson", "game")


def _sentiment(rng: random.Random, split: str, language: str) -> Drawn:
    positive = rng.random() < 0.5
    word = rng.choice(_POSITIVE if positive else _NEGATIVE)
    n = draw_number(rng, split, 2, 999)
    return (
        f"The {rng.choice(_THINGS)} with {n} guests was {word}.",
        "positive" if positive else "negative",
    )


def _minutes(rng: random.Random, split: str, language: str) -> Drawn:
    number = draw_number(rng, split, 61, 999)
    return f"{number} minutes", f"{number // 60} h {number % 60} min"


def _larger(rng: random.Random, split: str, language: str) -> Drawn:
    a = draw_number(rng, split, 1, 999)
    while (b := draw_number(rng, split, 1, 999)) == a:
        pass
    return f"{a} or {b}", str(max(a, b))


def _colon_time(rng: random.Random, split: str, language: str) -> Drawn:
    hour, minute = rng.randint(13, 23), draw_number(rng, split, 10, 59)
    return f"{hour}:{minute}", f"{hour - 12}:{minute} pm"


FIRST: dict[str, Operation] = {
    "card": Operation(
        family="numbers",
        draw=_on_number(cardinal, 999),
        wordings=(
            "Write the number in {language} words",
            "Spell out the number in {language}",
            "Convert the number to {language} words",
            "Turn the digits into {language} words",
            "Say this number in {language}",
            "Give the {language} words for the number",
            "Express the number in words, in {language}",
            "Number to {language} text",
            "Write the figure out in {language}",
            "Read the number aloud in {language}",
        ),
        test_wordings=(
            "How is this number spelled in {language}? Write it",
            "Put the number into words in the {language} language",
            "Transcribe the numeral as {language} words",
            "Verbalise the number in {language}",
            "I need this number written out in {language}",
        ),
    ),
    "ord": Operation(
        family="numbers",
        draw=_on_number(ordinal, 99),
        wordings=(
            "Write the {language} ordinal for the number",
            "Turn the number into an ordinal in {language}",
            "Give the ordinal word in {language}, like first or second",
            "Convert the number to an ordinal word in {language}",
            "Spell the rank out in {language}",
            "Write the position as an ordinal in {language}",
            "Say which place this is, in {language}",
            "Number to {language} ordinal",
            "Express the number as an ordinal numeral in {language}",
            "Write the {language} ordinal numeral",
        ),
        test_wordings=(
            "Name the {language} ordinal of this number",
            "Change the cardinal to an ordinal in {language}",
            "Spell the number as a rank (first, second, ...) in {language}",
            "I need the ordinal form of the number in {language}",
            "Ordinal word in {language}",
        ),
    ),
    "date": Operation(
        family="dates",
        draw=_on_day(long_date),
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
    "slash-date": Operation(
        family="dates",
        draw=_on_day(lambda day, _: day.strftime("%d/%m/%Y")),
        wordings=(
            "Rewrite the date as day/month/year",
            "Convert the ISO date to DD/MM/YYYY",
            "Write the date with slashes, day first",
            "Turn the date into day, month, year separated by slashes",
            "Reformat the date to dd/mm/yyyy",
            "Give the date in slash notation, day first",
            "Change the dashes of the date to slashes and put the day first",
            "Format the date numerically with slashes",
            "Reorder the date to day/month/year",
            "Show the date as DD/MM/YYYY",
        ),
        test_wordings=(
            "Put the date in European slash format",
            "Date to dd/mm/yyyy",
            "I want the day, then the month, then the year, with slashes",
            "Use slashes in the date and start with the day",
            "Rearrange this ISO date into DD/MM/YYYY form",
        ),
    ),
    "us-date": Operation(
        family="dates",
        draw=_on_day(lambda day, _: f"{day:%B} {day.day}, {day.year}"),
        wordings=(
            "Write the date the American way, month name first",
            "Convert the date to US long form",
            "Rewrite the ISO date as month, day, year in American style",
            "Give the American long date",
            "Format the date as Month D, YYYY",
            "Turn the date into US style with the month's name",
        ),
        test_wordings=(
            "Put the date in American format",
            "US date with the month written first",
            "Month name, day, comma, year",
        ),
    ),
    "last-first": Operation(
        family="names",
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
        family="names",
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
    "email": Operation(
        family="names",
        draw=_on_name(lambda first, last: f"{first.lower()}.{last.lower()}@example.com"),
        wordings=(
            "Make an example.com e-mail address from the name",
            "Write the person's e-mail address at example.com",
            "Turn the name into an email address",
            "Create the email firstname.lastname@example.com",
            "Build an e-mail address for this person",
            "Give the email address of this person at example.com",
            "Derive an email address from the full name",
            "Name to email address",
            "Form a mail address with first and last name",
            "Generate the company e-mail address for the name",
        ),
        test_wordings=(
            "What is this person's email at example.com",
            "Compose a mail address out of the name",
            "Produce an address like jane.doe@example.com",
            "Convert the person's name to an e-mail",
            "I need the email for this person",
        ),
    ),
    "username": Operation(
        family="names",
        draw=_on_name(lambda first, last: f"{first[0].lower()}{last.lower()}"),
        wordings=(
            "Make a user name from the first initial and the surname",
            "Create a login: first letter plus last name in lower case",
            "Turn the name into a user name",
            "Write the account name, like jsmith for John Smith",
            "Build a login name for this person",
            "Derive a username from the name",
        ),
        test_wordings=(
            "Which login does this person get",
            "Username from this full name",
            "Give the person's account handle",
        ),
    ),
    "surname": Operation(
        family="names",
        draw=_on_name(lambda first, last: last),
        wordings=(
            "Give only the surname",
            "Write the last name of the person",
            "Keep the family name and drop the first name",
            "What is the person's surname",
            "Extract the last name",
            "Reduce the name to the family name",
        ),
        test_wordings=(
            "Just the family name of this person",
            "Surname only",
            "Return the last name",
        ),
    ),
    "list-first": Operation(
        family="lists",
        draw=_on_list(lambda words: words[0]),
        wordings=(
            "Give the first item of the list",
            "Write the first word of the list",
            "Which item comes first in the list",
            "Pick the first element",
            "Return the first entry of the list",
            "Take the item at the start of the list",
            "Name the first thing listed",
            "Keep only the first item",
            "Output the list's first element",
            "Select the leading item",
        ),
        test_wordings=(
            "What does the list begin with",
            "Find the first entry",
            "State the item in first position",
            "Head of the list",
            "Return whatever is listed first",
        ),
    ),
    "list-last": Operation(
        family="lists",
        draw=_on_list(lambda words: words[-1]),
        wordings=(
            "Give the last item of the list",
            "Write the last word of the list",
            "Which item comes last in the list",
            "Pick the last element",
            "Return the final entry of the list",
            "Take the item at the end of the list",
            "Name the last thing listed",
            "Keep only the last item",
            "Output the list's final element",
            "Select the closing item",
        ),
        test_wordings=(
            "What does the list end with",
            "Find the last entry",
            "State the item in last position",
            "Tail of the list",
            "Return whatever is listed last",
        ),
    ),
    "list-second": Operation(
        family="lists",
        draw=_on_list(lambda words: words[1]),
        wordings=(
            "Give the second item of the list",
            "Write the second word of the list",
            "Which item comes second in the list",
            "Pick the second element",
            "Return entry number two of the list",
            "Name the second thing listed",
        ),
        test_wordings=(
            "Find the second entry",
            "State the item in second position",
            "Return whatever is listed second",
        ),
    ),
    "list-reverse": Operation(
        family="lists",
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
        family="lists",
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
    "record-name": Operation(
        family="records",
        draw=_on_record("name"),
        wordings=(
            "Extract the person's name from the sentence",
            "Find the full name in the text",
            "Who is mentioned in the sentence? Give the name",
            "Pull the name of the person out of the text",
            "Return the person named in the message",
            "Write the name of the person in the sentence",
            "Which person does the sentence talk about",
            "Get the person's full name from the record",
            "Identify the person in the text",
            "Name extraction: give the person",
        ),
        test_wordings=(
            "Tell me which person appears in the sentence",
            "Spot the person's name in this message",
            "The name of whoever is mentioned in the text",
            "From the sentence, take out the person",
            "Locate the full name in the record",
        ),
    ),
    "record-city": Operation(
        family="records",
        draw=_on_record("city"),
        wordings=(
            "Extract the city from the sentence",
            "Find the city in the text",
            "Which city is mentioned? Give it",
            "Pull the city name out of the text",
            "Return the place named in the message",
            "Write the city that occurs in the sentence",
            "Where is it? Give the city in the sentence",
            "Get the city from the record",
            "Identify the location in the text",
            "City extraction: give the city",
        ),
        test_wordings=(
            "Tell me which town appears in the sentence",
            "Spot the city in this message",
            "The city mentioned in the text",
            "From the sentence, take out the city",
            "Locate the place in the record",
        ),
    ),
    "record-amount": Operation(
        family="records",
        draw=_on_record("amount"),
        wordings=(
            "Extract the amount from the sentence",
            "Find the quantity in the text",
            "How much or how many? Give the number in the sentence",
            "Pull the number out of the text",
            "Return the amount named in the message",
            "Write the quantity that occurs in the sentence",
            "Which amount is mentioned",
            "Get the number from the record",
            "Identify the figure in the text",
            "Amount extraction: give the number",
        ),
        test_wordings=(
            "Tell me which quantity appears in the sentence",
            "Spot the amount in this message",
            "The number mentioned in the text",
            "From the sentence, take out the amount",
            "Locate the figure in the record",
        ),
    ),
    "record-weekday": Operation(
        family="records",
        draw=_on_record("weekday"),
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
        family="words",
        draw=_on_word("nouns", _inflected("NNS")),
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
    "past": Operation(
        family="words",
        draw=_on_word("verbs", _inflected("VBD")),
        wordings=(
            "Write the past tense of the verb",
            "Give the simple past",
            "Turn the verb into the past tense",
            "Put the verb into the past",
            "What is the past form of this verb",
            "Make the verb past tense",
            "Convert the verb to the simple past",
            "Form the past tense of the word",
            "Say the verb as it was yesterday",
            "Infinitive to past tense",
        ),
        test_wordings=(
            "Change the verb so that it describes the past",
            "State the preterite",
            "Past tense, please, of this verb",
            "How does one say this verb for yesterday",
            "I need the past form of the verb",
        ),
    ),
    "gerund": Operation(
        family="words",
        draw=_on_word("verbs", _inflected("VBG")),
        wordings=(
            "Write the -ing form of the verb",
            "Give the present participle",
            "Turn the verb into its gerund",
            "Put the verb into the continuous form",
            "Make the verb end in -ing",
            "Form the present participle of the word",
        ),
        test_wordings=(
            "State the gerund",
            "The verb with -ing, please",
            "I need the present participle of the verb",
        ),
    ),
    "sentiment": Operation(
        family="opinions",
        draw=_sentiment,
        wordings=(
            "Say whether the review is positive or negative",
            "Classify the sentiment of the sentence",
            "Is the opinion positive or negative",
            "Label the mood of the review",
            "Decide if the writer liked it: positive or negative",
            "Rate the review as positive or negative",
        ),
        test_wordings=(
            "Tell the sentiment",
            "Judge the tone: positive or negative",
            "Sentiment label for this review",
        ),
    ),
    "minutes": Operation(
        family="units",
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
    "larger": Operation(
        family="comparison",
        draw=_larger,
        wordings=(
            "Which of the two numbers is larger",
            "Give the bigger number",
            "Write the greater of the two numbers",
            "Choose the larger number",
            "Compare the numbers and return the maximum",
            "Pick the higher number",
        ),
        test_wordings=(
            "State the maximum of both",
            "The larger one, please",
            "Find the greater number",
        ),
    ),
    "clock": Operation(
        family="times",
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

OPERATIONS: dict[str, Operation] = {**FIRST, **FAMILIES}
