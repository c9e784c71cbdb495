"""On dates in ISO form."""

import calendar
import random
from datetime import date, timedelta

from ..draws import Drawn, Operation, draw_day
from ..rows import Row, series, table

_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl")
_FORMATS = ("plain", "json", "quotes", "tag", "sentence")  # capitals change no digit
_SEASONS = ("winter", "spring", "summer", "autumn")


def _day(rng: random.Random, split: str) -> tuple[str, date]:
    day = draw_day(rng, split)
    return day.isoformat(), day


def _two_days(rng: random.Random, split: str) -> tuple[str, tuple[date, date]]:
    first = draw_day(rng, split)
    while (second := draw_day(rng, split)) == first:
        pass
    return f"{first} and {second}", (first, second)


def _of_month(pattern: str, wordings: tuple[str, ...], tests: tuple[str, ...]) -> Operation:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        from babel.dates import format_date

        day = draw_day(rng, split)
        return day.isoformat(), str(format_date(day, format=pattern, locale=language))

    return Operation("calendar-words", draw, wordings, tests, languages=_LANGUAGES)


def _shaped(pattern: str, shape: str, test: str) -> Row:
    return Row(
        lambda day: day.strftime(pattern),
        (f"write the date as {shape}", f"reformat the date to {shape}"),
        (f"the date {test}",),
    )


CALENDAR: dict[str, Operation] = {
    "month-name": _of_month(
        "LLLL",
        (
            "Write the {language} name of the month",
            "Which month is it? Answer in {language}",
            "Give the month of the date in {language}",
            "The month's name in {language}",
        ),
        ("Name the month of this date in {language}", "Say only the month, in {language}"),
    ),
    "weekday-name": _of_month(
        "EEEE",
        (
            "Write the {language} name of the weekday",
            "Which day of the week is it? Answer in {language}",
            "Give the weekday of the date in {language}",
            "The day of the week in {language}",
        ),
        ("Name the weekday of this date in {language}", "Say only the weekday, in {language}"),
    ),
    **table(
        "calendar",
        _day,
        {
            "year": Row(
                lambda day: str(day.year),
                ("the year of the date", "keep only the year"),
                ("in which year it was",),
            ),
            "short-year": Row(
                lambda day: f"'{day.year % 100:02d}",
                ("the year with two digits after an apostrophe", "shorten the year to 'YY"),
                ("the year as in '98",),
            ),
            "month-number": Row(
                lambda day: str(day.month),
                ("the number of the month, without a zero", "keep only the month as a number"),
                ("which month of the year it is, in figures",),
            ),
            "day-number": Row(
                lambda day: str(day.day),
                ("the day of the month, without a zero", "keep only the day"),
                ("which day of its month it is",),
            ),
            "quarter": Row(
                lambda day: f"Q{(day.month + 2) // 3}",
                ("the quarter of the year, like Q1", "the quarter that the date lies in"),
                ("Q and the number of the quarter",),
            ),
            "half-year": Row(
                lambda day: "H1" if day.month <= 6 else "H2",
                ("H1 or H2 for the half of the year", "the half-year of the date"),
                ("which half of the year it is, H1 or H2",),
            ),
            "decade": Row(
                lambda day: f"{day.year // 10 * 10}s",
                ("the decade, like 1990s", "round the year down to its decade"),
                ("which decade that was",),
            ),
            "century": Row(
                lambda day: "20th" if day.year <= 2000 else "21st",
                ("the century, 20th or 21st", "say which century the date lies in"),
                ("the century of the date as 20th or 21st",),
            ),
            "leap-year": Row(
                lambda day: "yes" if calendar.isleap(day.year) else "no",
                ("whether it is a leap year, yes or no", "say yes if its year is a leap year"),
                ("if the year has a 29 February: yes or no",),
            ),
            "season": Row(
                lambda day: _SEASONS[day.month % 12 // 3],
                ("the season in the north, winter from December", "the season of the date"),
                ("which season it is in Europe by months",),
            ),
            "year-month": _shaped("%Y-%m", "year-month without the day", "without its day"),
            "month-day": _shaped("%m-%d", "month-day without the year", "without its year"),
            "next-year": Row(
                lambda day: f"{day.year + 1}{day.isoformat()[4:]}",
                ("the same day one year later", "add one to the year"),
                ("the date a year on",),
            ),
            "last-year": Row(
                lambda day: f"{day.year - 1}{day.isoformat()[4:]}",
                ("the same day one year earlier", "take one off the year"),
                ("the date a year before",),
            ),
            "month-start": Row(
                lambda day: day.replace(day=1).isoformat(),
                ("the first day of the month", "set the day to 01"),
                ("when that month began",),
            ),
            "month-end": Row(
                lambda day: day.replace(
                    day=calendar.monthrange(day.year, day.month)[1]
                ).isoformat(),
                ("the last day of the month", "the date on which the month ends"),
                ("the closing day of that month",),
            ),
            "month-length": Row(
                lambda day: str(calendar.monthrange(day.year, day.month)[1]),
                ("the number of days in the month", "say how many days the month has"),
                ("how long that month is in days",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "date-shapes",
        _day,
        {
            "dot-date": _shaped("%d.%m.%Y", "DD.MM.YYYY", "with dots, day first"),
            "dash-date": _shaped("%d-%m-%Y", "DD-MM-YYYY", "with hyphens, day first"),
            "us-slash-date": _shaped("%m/%d/%Y", "MM/DD/YYYY", "in American numbers"),
            "year-slash-date": _shaped("%Y/%m/%d", "YYYY/MM/DD", "with slashes, year first"),
            "compact-date": _shaped("%Y%m%d", "YYYYMMDD", "without any separator"),
            "short-date": _shaped("%d.%m.%y", "DD.MM.YY", "with dots and a two-digit year"),
            "short-slash-date": _shaped("%d/%m/%y", "DD/MM/YY", "slashed, year in two digits"),
            "spaced-date": _shaped("%d %m %Y", "DD MM YYYY", "with blanks, day first"),
            "log-date": _shaped("%d/%b/%Y", "DD/Mon/YYYY", "as web servers log it"),
            "abbreviated-date": _shaped("%d %b %Y", "DD Mon YYYY", "with a short English month"),
            "upper-date": Row(
                lambda day: day.strftime("%d-%b-%y").upper(),
                ("write the date as DD-MON-YY in capitals", "reformat the date to DD-MON-YY"),
                ("the date as airlines print it",),
            ),
            "midnight": Row(
                lambda day: f"{day.isoformat()}T00:00:00",
                ("add the time T00:00:00", "write the date as a timestamp at midnight"),
                ("the ISO timestamp of the day's start",),
            ),
            "file-date": Row(
                lambda day: f"report_{day:%Y_%m_%d}.pdf",
                ("a file name report_YYYY_MM_DD.pdf", "name the day's report file"),
                ("what the PDF report of this day is called",),
            ),
            "dated-path": Row(
                lambda day: f"/{day.year}/{day:%m}/{day:%d}/",
                ("a path with folders for year, month and day", "the date as /YYYY/MM/DD/"),
                ("the blog path of the date",),
            ),
        },
        formats=_FORMATS,
    ),
    **series(
        "date-sums",
        _day,
        "days-later",
        (1, 2, 3, 7),
        Row(
            lambda day, n: (day + timedelta(days=n)).isoformat(),
            ("the date {n} day{s} later", "add {n} day{s} to the date"),
            ("which date it is after {word} more day{s}",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "date-sums",
        _day,
        "days-earlier",
        (1, 2, 3),
        Row(
            lambda day, n: (day - timedelta(days=n)).isoformat(),
            ("the date {n} day{s} earlier", "go {n} day{s} back"),
            ("which date it was {word} day{s} before",),
        ),
        formats=_FORMATS,
    ),
    **table(
        "date-sums",
        _two_days,
        {
            "earlier-date": Row(
                lambda two: min(two).isoformat(),
                ("the earlier of the two dates", "pick the date that comes first"),
                ("which date lies further back",),
            ),
            "later-date": Row(
                lambda two: max(two).isoformat(),
                ("the later of the two dates", "pick the date that comes last"),
                ("which date is more recent",),
            ),
            "date-range": Row(
                lambda two: f"{min(two)}/{max(two)}",
                ("an ISO interval, the earlier date first", "join them with a slash, in order"),
                ("the span from the earlier to the later date, with a slash",),
            ),
        },
        formats=_FORMATS,
    ),
}
