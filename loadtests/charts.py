"""The report's charts as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib.figure import Figure

__all__ = [
    "against",
    "chart_by_tier",
    "chart_memory",
    "chart_saturation",
    "chart_timeline",
]

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "loraplex",
}
_PERCENTS = ("p50", "p95", "p99")
Rows = Sequence[Mapping[str, Any]]


def against(phases: Rows, x_name: str, *, log: bool = False) -> str:
    """Throughput, TTFT and ITL against each phase's ``x``."""
    rows = sorted(phases, key=lambda row: row["x"])
    xs = [row["x"] for row in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        axes[0].plot(xs, [row["output_tok_s"] for row in rows], "o-")
        axes[0].set_title("output tokens/s")
        for axis, key, title in ((axes[1], "ttft_s", "TTFT, s"), (axes[2], "itl_ms", "ITL, ms")):
            for percent in _PERCENTS:
                axis.plot(xs, [row[key][percent] for row in rows], "o-", label=percent)
            axis.set_title(title)
            axis.legend()
        for axis in axes:
            axis.set_xlabel(x_name)
            axis.set_ylim(bottom=0)
            if log:
                axis.set_xscale("log", base=2)
                axis.set_xticks(xs, [f"{x:g}" for x in xs])

    return _svg(draw, height=2.8)


def chart_saturation(phases: Rows, slo: Mapping[str, float], unit: str) -> str:
    rows = sorted(phases, key=lambda row: row["x"])
    xs = [row["x"] for row in rows]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(xs, [row["requests_per_s"] for row in rows], "o-", label="served")
        left.plot(xs, [row["goodput_per_s"] for row in rows], "s-", label="within the SLO")
        left.plot(xs, [row["refused"] / row["seconds"] for row in rows], "x--", label="refused")
        left.set_title(f"requests/s (SLO: TTFT ≤ {slo['ttft_s']} s, gap ≤ {slo['itl_s']} s)")
        for percent in _PERCENTS:
            right.plot(xs, [row["ttft_s"][percent] for row in rows], "o-", label=percent)
        right.set_title("TTFT, s")
        for axis in (left, right):
            axis.set_xlabel(unit)
            axis.set_ylim(bottom=0)
            axis.legend()

    return _svg(draw, height=2.8)


def chart_by_tier(tiers: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(tiers)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        values = [tiers[name]["ttft_p50_s"] * 1000 for name in names]
        bars = axis.barh(names, values)
        axis.bar_label(
            bars,
            [f"{value:.0f} ms, n={tiers[n]['n']}" for value, n in zip(values, names, strict=True)],
        )
        axis.set_title("TTFT p50 by the tier of the adapter, idle server, ms")
        axis.margins(x=0.2)

    return _svg(draw, height=1.8)


def chart_memory(sights: Rows) -> str:
    """Bytes against adapters in memory, one dot for each look."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        seen = [row for row in sights if "resident_adapters" in row["values"]]
        for axis, key, unit, title in (
            (left, "resident_adapters", "pool_bytes", "device pool"),
            (right, "host_adapters", "host_bytes", "host tier"),
        ):
            points = [
                (row["values"][key], row["values"][unit] / 2**20)
                for row in seen
                if key in row["values"] and unit in row["values"]
            ]
            axis.plot(*_columns(points), ".", label=title)
            axis.set_xlabel(f"adapters in the {title}")
            axis.set_ylabel("MiB")
        with_rss = [row for row in seen if row["rss_bytes"]]
        points = [(row["values"]["host_adapters"], row["rss_bytes"] / 2**20) for row in with_rss]
        right.plot(*_columns(points), ".", label="resident memory of the process")
        for axis in (left, right):
            axis.set_ylim(bottom=0)
            axis.legend()

    return _svg(draw, height=2.6)


def chart_timeline(sights: Rows) -> str:
    xs = [row["at"] for row in sights]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for key in ("running", "waiting"):
            axes[0].plot(xs, [row["values"].get(key) for row in sights], label=key)
        axes[0].set_title("requests")
        for key in ("loads", "evictions"):
            axes[1].plot(xs, [row["values"].get(key) for row in sights], label=key)
        axes[1].set_title("adapter loads and evictions")
        rss = [(row["at"], row["rss_bytes"] / 2**20) for row in sights if row["rss_bytes"]]
        axes[2].plot(*_columns(rss), label="resident MiB")
        axes[2].set_title("memory and open files")
        files = [(row["at"], row["open_files"]) for row in sights if row["open_files"]]
        twin = axes[2].twinx()
        twin.grid(visible=False)
        twin.plot(*_columns(files), "C1", label="open files")
        axes[2].set_ylim(bottom=0)
        twin.set_ylim(bottom=0)
        for axis in axes:
            axis.set_xlabel("s")
            axis.legend(loc="lower right")
        twin.legend(loc="upper right")

    return _svg(draw, height=2.6)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _svg(draw: Any, *, height: float) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
