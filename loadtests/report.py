"""One HTML file: tables and charts inline, nothing to fetch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render_report"]

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 13px }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto }} .note {{ color: #666 }} .bad {{ color: #b00020 }}
</style></head><body>
"""
_SWEEPS = {
    "adapters": ("Against the number of distinct adapters", "distinct adapters", True),
    "skew": ("Against skew", "Zipf exponent", False),
    "working-set": ("Against the working set", "distinct adapters", False),
}


def render_report(result: Mapping[str, Any]) -> str:
    from . import charts

    title = f"loraplex bench {result['scenario']}"
    parts = [_HEAD.format(title=html.escape(title)), f"<h1>{html.escape(title)}</h1>"]
    parts.append(f"<p>{html.escape(result['summary'])}</p>")
    machine = result["machine"]
    parts.append(
        f"<p class=note>{html.escape(machine['cpu'])}, {machine['cores']} cores · commit "
        f"{html.escape(result['commit'])} · {html.escape(result['began'])} · seed "
        f"{result['seed']} · prompts of {result['request']['prompt_chars']} characters, "
        f"{result['request']['max_tokens']} output tokens · the load generator runs on the same "
        "machine</p>"
    )
    parts += [f"<p class=bad>{html.escape(note)}</p>" for note in result["notes"]]
    for system, run in result["systems"].items():
        phases = run["phases"]
        loads = [row for row in phases if row["kind"] == "load"]
        parts.append(f"<h2>{html.escape(system)}</h2>")
        parts.append(_phase_table(loads))
        for sweep, (heading, x_name, log) in _SWEEPS.items():
            rows = [row for row in loads if row["sweep"] == sweep and row["served"]]
            if len(rows) > 1:
                parts += [f"<h3>{heading}</h3>", charts.against(rows, x_name, log=log)]
        rows = [row for row in loads if row["sweep"] == "load" and row["served"]]
        if len(rows) > 1:
            unit = "offered requests/s" if rows[0]["open"] else "clients"
            parts.append("<h3>Saturation</h3>")
            parts.append(charts.chart_saturation(rows, result["slo"], unit))
        for row in phases:
            if row["kind"] == "tiers" and row["tiers"]:
                parts += ["<h3>Cold and warm adapters</h3>", charts.chart_by_tier(row["tiers"])]
        parts += _families(loads)
        if run["sights"]:
            parts += ["<h3>Memory against adapters held</h3>", charts.chart_memory(run["sights"])]
            parts += ["<h3>Over time</h3>", charts.chart_timeline(run["sights"])]
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _phase_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "phase", "adapters", "served", "refused", "lost", "req/s", "goodput/s", "tok/s",
        "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms",
        "TTFT p50 first use / again, s",
    )  # fmt: skip
    lines = []
    for row in rows:
        cells = [
            html.escape(row["label"]), row["distinct_adapters"], row["served"], row["refused"],
            f"<span class=bad title='{html.escape(row['first_error'] or '', quote=True)}'>"
            f"{row['lost']}</span>" if row["lost"] else "0",
            f"{row['requests_per_s']:.2f}", f"{row['goodput_per_s']:.2f}",
            f"{row['output_tok_s']:.0f}",
            _triple(row["ttft_s"], 2), _triple(row["itl_ms"], 0),
            f"{_number(row['first_use_ttft_s']['p50'], 2)} / "
            f"{_number(row['again_ttft_s']['p50'], 2)}",
        ]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"


def _families(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = [row for row in rows if len(row["by_family"]) > 1]
    if not shown:
        return []
    lines = [
        f"<tr><td>{html.escape(row['label'])}: {html.escape(family)}</td><td>{found['served']}</td>"
        f"<td>{_triple(found['ttft_s'], 2)}</td><td>{_triple(found['itl_ms'], 0)}</td></tr>"
        for row in shown
        for family, found in row["by_family"].items()
    ]
    head = "<tr><th>family</th><th>served</th><th>TTFT, s</th><th>ITL, ms</th></tr>"
    return ["<h3>By family</h3>", f"<table>{head}{''.join(lines)}</table>"]


def _triple(values: Mapping[str, float | None], digits: int) -> str:
    return " / ".join(_number(values[name], digits) for name in ("p50", "p95", "p99"))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
