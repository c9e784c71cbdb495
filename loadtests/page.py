"""Writes a report as one HTML file with inline SVG, which loads nothing and can be sent around."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .scenario import Slo

_WIDTH, _HEIGHT = 960, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 24, 34  # margins of a plot
_COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 1.5rem 0 } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: currentColor } .border { stroke: #8886; stroke-dasharray: 4 3 }
.axis { stroke: #8888 } :root { color-scheme: light dark }
"""
Rows = Sequence[Mapping[str, Any]]


class Line(NamedTuple):
    """A line of a plot has a value for each phase, and None for one that served nothing."""

    name: str
    values: Sequence[float | None]


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page: throughput and latency of each system, over its phases."""
    machine = report["machine"]
    title = f"loraplex bench {report['scenario']}"
    about = (
        f"{machine['cpu']}, {machine['cores']} cores · commit {report['commit']} · "
        f"{report['began']} · seed {report['seed']}"
    )
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{escape(report['summary'])}</p>"
        f"<p>{escape(about)}</p><p>Goodput counts requests with "
        f"{escape(str(Slo(**report['slo'])))}. A dashed line is the border of two phases.</p>",
        *(f"<p><strong>Note:</strong> {escape(note)}</p>" for note in report["notes"]),
    ]
    for name, phases in report["systems"].items():
        rows = [row for row in phases if row["kind"] == "load"]
        if rows:
            parts.append(f"<h2>{escape(name)}</h2>{''.join(_plots(rows))}")
    path.write_text("".join(parts) + "</html>\n", encoding="utf-8")


def _plots(rows: Rows) -> list[str]:
    return [
        _plot("output tokens/s", rows, [_line("tokens", rows, "output_tok_s")]),
        _plot(
            "requests/s",
            rows,
            [_line("served", rows, "requests_per_s"), _line("goodput", rows, "goodput_per_s")],
        ),
        _plot("time to first token, s", rows, _percentiles(rows, "ttft_s")),
        _plot("gap between tokens, ms", rows, _percentiles(rows, "itl_ms")),
    ]


def _line(name: str, rows: Rows, key: str) -> Line:
    return Line(name, [row[key] for row in rows])


def _percentiles(rows: Rows, key: str) -> list[Line]:
    return [
        Line(percent, [row[key][percent] if row["served"] else None for row in rows])
        for percent in ("p50", "p95", "p99")
    ]


def _plot(title: str, rows: Rows, lines: Sequence[Line]) -> str:
    """Return a figure in which a phase is as wide as it is long, with a level for each value."""
    total = sum(row["seconds"] for row in rows)
    highest = max((v for line in lines for v in line.values if v is not None), default=0) or 1
    starts = [sum(row["seconds"] for row in rows[:i]) for i in range(len(rows) + 1)]
    xs = [_LEFT + (_WIDTH - _LEFT - _RIGHT) * start / total for start in starts]
    bottom = _HEIGHT - _BOTTOM
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{_LEFT - 6}" y="{bottom + 4}" text-anchor="end">0</text>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{highest:.3g}</text>',
        *(
            f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            for x in xs[1:-1]
        ),
        *(
            f'<text class="phase" x="{(left + right) / 2:.1f}" y="{_HEIGHT - 12}" '
            f'text-anchor="middle">{escape(row["label"])}</text>'
            for row, left, right in zip(rows, xs, xs[1:], strict=False)
        ),
    ]
    for number, (line, colour) in enumerate(zip(lines, _COLOURS, strict=False)):
        parts.append(
            f'<text x="{_LEFT + 90 * number}" y="14" style="fill: {colour}">{line.name}</text>'
        )
        for value, row, left, right in zip(line.values, rows, xs, xs[1:], strict=False):
            if value is not None:
                y = bottom - (bottom - _TOP) * value / highest
                parts.append(
                    f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                    f'stroke="{colour}" stroke-width="3">'
                    f"<title>{escape(row['label'])}, {line.name}: {value:.4g}</title></line>"
                )
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} over the phases">'
        f"{''.join(parts)}</svg></figure>"
    )
