"""The page of a comparison: one HTML file without scripts that can be sent around."""

from collections.abc import Sequence
from html import escape

from .comparison import Arm, Row
from .metrics import Mean

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8884; padding: .35rem .6rem; text-align: left }
td { vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
.bar { background: #3b5bdb; height: .7rem; border-radius: 3px }
.right { color: #2b8a3e } .wrong { color: #c92a2a }
"""


def page_of(title: str, metric: str, rows: Sequence[Row], arms: Sequence[Arm]) -> str:
    """Return the page: a line for each adapter, then the rows, those with differences first."""
    order = sorted(range(len(rows)), key=lambda i: len({arm.scores[i] for arm in arms}) == 1)
    head = "".join(f"<th>{escape(arm.name)}</th>" for arm in arms)
    body = "".join(_row(rows[i], [(arm.answers[i], arm.scores[i]) for arm in arms]) for i in order)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p>{len(rows)} rows, greedy answers, scored by <code>{escape(metric)}</code>. Intervals "
        "hold the mean of new rows of the same kind with 95 % confidence.</p>"
        "<table><tr><th>adapter</th><th>score</th><th></th><th>gain</th><th></th></tr>"
        f"{''.join(map(_arm, arms))}</table><h2>Rows</h2>"
        f"<table><tr><th>asked</th><th>expected</th>{head}</tr>{body}</table></html>\n"
    )


def shown(mean: Mean, *, signed: bool = False) -> str:
    """Return a mean with its interval in per cent, as ``72 % (65 to 80)``."""
    value, low, high = (round(100 * part) for part in mean)
    return f"{value:+d} ({low:+d} to {high:+d})" if signed else f"{value} % ({low} to {high})"


def _arm(arm: Arm) -> str:
    gain = "" if arm.gain is None else shown(arm.gain, signed=True)
    bar = f'<div class="bar" style="width: {100 * arm.mean.value:.0f}%"></div>'
    cells = escape(arm.name), shown(arm.mean), bar, gain, arm.verdict
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _row(row: Row, answers: Sequence[tuple[str, float]]) -> str:
    asked = row.chat.messages[-1]["content"]
    cells = "".join(
        f'<td class="{"right" if score == 1 else "wrong"}">{escape(answer)}</td>'
        for answer, score in answers
    )
    return f"<tr><td>{escape(asked)}</td><td>{escape(row.expected)}</td>{cells}</tr>"
