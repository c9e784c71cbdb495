"""On times of the day and durations."""

import random

from ..draws import Operation, draw_number, owned
from ..rows import Row, series, table

_DAY = 24 * 60
_FORMATS = ("plain", "json", "quotes", "tag", "sentence")


def _time(rng: random.Random, split: str) -> tuple[str, int]:
    """Minutes since midnight."""
    text = owned(rng, split, lambda r: _shown(r.randrange(_DAY)))
    return text, int(text[:2]) * 60 + int(text[3:])


def _seconds(rng: random.Random, split: str) -> tuple[str, int]:
    seconds = draw_number(rng, split, 61, 3_599)
    return f"{seconds} s", seconds


def _hours(rng: random.Random, split: str) -> tuple[str, int]:
    hours = draw_number(rng, split, 25, 999)
    return f"{hours} hours", hours


def _shown(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _twelve(minutes: int) -> tuple[int, int, str]:
    hour = minutes // 60
    return (hour - 1) % 12 + 1, minutes % 60, "am" if hour < 12 else "pm"


def _part_of_day(minutes: int) -> str:
    hour = minutes // 60
    names = ((6, "night"), (12, "morning"), (18, "afternoon"), (24, "evening"))
    return next(name for end, name in names if hour < end)


CLOCKS: dict[str, Operation] = {
    **table(
        "day-times",
        _time,
        {
            "hour": Row(
                lambda t: str(t // 60),
                ("the hour, without a zero", "keep only the hour"),
                ("which full hour has struck",),
            ),
            "minute": Row(
                lambda t: str(t % 60),
                ("the minutes, without a zero", "keep only the minutes"),
                ("how many minutes past the hour it is",),
            ),
            "am-or-pm": Row(
                lambda t: _twelve(t)[2],
                ("am or pm", "say whether it is am or pm"),
                ("which half of the day it is, am or pm",),
            ),
            "day-part": Row(
                _part_of_day,
                (
                    "night, morning, afternoon or evening, by steps of six hours",
                    "name the part of the day: night, morning, afternoon, evening",
                ),
                ("what one calls this time of day, in quarters from midnight",),
            ),
            "time-am-pm": Row(
                lambda t: "{}:{:02d} {}".format(*_twelve(t)),
                ("the time with am or pm", "write the time on the 12-hour clock"),
                ("the time as Americans write it",),
            ),
            "time-dot": Row(
                lambda t: _shown(t).replace(":", "."),
                ("the time with a dot", "put a dot in place of the colon"),
                ("hours and minutes with a full stop between",),
            ),
            "time-h": Row(
                lambda t: _shown(t).replace(":", "h"),
                ("the time the French way, like 14h30", "put an h in place of the colon"),
                ("hours and minutes with an h between",),
            ),
            "time-compact": Row(
                lambda t: _shown(t).replace(":", ""),
                ("the time in four digits", "remove the colon"),
                ("military time without a separator",),
            ),
            "time-seconds": Row(
                lambda t: f"{_shown(t)}:00",
                ("add zero seconds", "write the time as HH:MM:SS"),
                ("the time down to the second, which is 00",),
            ),
            "time-uhr": Row(
                lambda t: f"{_shown(t)} Uhr",
                ("put Uhr after the time", "write the time the German way with Uhr"),
                ("the time as Germans print it",),
            ),
            "since-midnight": Row(
                str,
                ("the minutes since midnight", "convert the time to minutes of the day"),
                ("how many minutes have passed since 00:00",),
            ),
            "hour-start": Row(
                lambda t: f"{t // 60:02d}:00",
                ("set the minutes to zero", "round the time down to the hour"),
                ("the full hour before",),
            ),
            "next-hour": Row(
                lambda t: f"{(t // 60 + 1) % 24:02d}:00",
                ("the next full hour", "round the time up to the coming hour"),
                ("when the clock strikes next",),
            ),
        },
        formats=_FORMATS,
    ),
    **series(
        "time-sums",
        _time,
        "minutes-later",
        (5, 10, 15, 30),
        Row(
            lambda t, n: _shown((t + n) % _DAY),
            ("the time {n} minutes later", "add {n} minutes"),
            ("what the clock shows after {n} more minutes",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "time-sums",
        _time,
        "hours-later",
        (1, 2, 3, 6),
        Row(
            lambda t, n: _shown((t + 60 * n) % _DAY),
            ("the time {n} hour{s} later", "add {word} hour{s}"),
            ("what the clock shows {word} hour{s} on",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "time-sums",
        _time,
        "hours-earlier",
        (1, 2, 3),
        Row(
            lambda t, n: _shown((t - 60 * n) % _DAY),
            ("the time {n} hour{s} earlier", "subtract {word} hour{s}"),
            ("what the clock showed {word} hour{s} ago",),
        ),
        formats=_FORMATS,
    ),
    **table(
        "durations",
        _seconds,
        {
            "seconds-to-clock": Row(
                lambda s: f"{s // 60}:{s % 60:02d}",
                ("the duration as m:ss", "convert the seconds to minutes:seconds"),
                ("the running time as a player shows it",),
            ),
            "seconds-to-words": Row(
                lambda s: f"{s // 60} min {s % 60} s",
                ("the duration in min and s", "split the seconds into minutes and seconds"),
                ("how many min and s that takes",),
            ),
            "seconds-to-ms": Row(
                lambda s: f"{s}000 ms",
                ("convert to milliseconds", "the same in ms"),
                ("how many milliseconds that is",),
            ),
        },
        formats=_FORMATS,
    ),
    **table(
        "durations",
        _hours,
        {
            "hours-to-days": Row(
                lambda h: f"{h // 24} d {h % 24} h",
                ("the duration in d and h", "split the hours into days and hours"),
                ("how many days and remaining hours that is",),
            ),
            "full-days": Row(
                lambda h: str(h // 24),
                ("the number of full days", "divide the hours by 24 and drop the rest"),
                ("how many whole days fit in",),
            ),
        },
        formats=_FORMATS,
    ),
}
