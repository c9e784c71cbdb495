"""Draws a report as one PNG: a row of three plots for each sweep, and one row over time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .server_metrics import MetricsSample

_SWEEPS = {  # sweep of a phase → what its x is
    "adapters": "distinct adapters",
    "working-set": "distinct adapters",
    "skew": "Zipf exponent",
    "load": "load",
}
_PERCENTS = ("p50", "p95", "p99")
_MIB = 1 << 20
Rows = Sequence[Mapping[str, Any]]
Draw = Callable[[Sequence[Axes]], None]  # fills a row of three plots


def write_plot(systems: Mapping[str, Rows], samples: Sequence[MetricsSample], path: Path) -> None:
    """Write the PNG. ``systems``: phases by system; ``samples``: of the Loraplex server."""
    draws: list[Draw] = []
    for name, phases in systems.items():
        for sweep, x_name in _SWEEPS.items():
            rows = [row for row in phases if row["sweep"] == sweep and row["served"]]
            if len(rows) > 1:
                draws.append(_curves(name, x_name, sorted(rows, key=lambda row: row["x"])))
    draws.append(_over_time(samples))
    figure = Figure(figsize=(11, 2.8 * len(draws)), layout="constrained")
    for draw, axes in zip(draws, figure.subplots(len(draws), 3, squeeze=False), strict=True):
        draw(axes)
        for axis in axes:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _curves(system: str, x_name: str, rows: Rows) -> Draw:
    """Draw throughput, TTFT and ITL against each phase's ``x``."""
    xs = [row["x"] for row in rows]

    def draw(axes: Sequence[Axes]) -> None:
        if x_name == _SWEEPS["load"]:
            x_label = "offered requests/s" if rows[0]["open"] else "clients"
            axes[0].plot(xs, [row["requests_per_s"] for row in rows], "o-", label="served")
            axes[0].plot(xs, [row["goodput_per_s"] for row in rows], "s-", label="within the SLO")
            refused = [row["refused"] / row["seconds"] for row in rows]
            axes[0].plot(xs, refused, "x--", label="refused")
            axes[0].set_title(f"{system}: requests/s")
        else:
            x_label = x_name
            axes[0].plot(xs, [row["output_tok_s"] for row in rows], "o-", label="output tokens/s")
            axes[0].set_title(f"{system}: throughput")
        for axis, key, title in ((axes[1], "ttft_s", "TTFT, s"), (axes[2], "itl_ms", "ITL, ms")):
            for percent in _PERCENTS:
                axis.plot(xs, [row[key][percent] for row in rows], "o-", label=percent)
            axis.set_title(title)
        for axis in axes:
            axis.set_xlabel(x_label)
            if x_name == "distinct adapters":
                axis.set_xscale("log", base=2)
                axis.set_xticks(xs, [f"{x:g}" for x in xs])

    return draw


def _over_time(samples: Sequence[MetricsSample]) -> Draw:
    """Draw requests, adapters and memory of the Loraplex server over time."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, keys, scale, title in (
            (axes[0], ("running", "waiting"), 1, "requests"),
            (axes[1], ("resident_adapters", "host_adapters", "loads", "evictions"), 1, "adapters"),
            (axes[2], ("pool_bytes", "host_bytes"), _MIB, "memory, MiB"),
        ):
            for key in keys:
                points = [(s.at, s.values[key] / scale) for s in samples if key in s.values]
                if points:
                    axis.plot(*zip(*points, strict=True), label=key.replace("_", " "))
            axis.set_title(title)
            axis.set_xlabel("s")
        rss = [(s.at, s.rss_bytes / _MIB) for s in samples if s.rss_bytes]
        if rss:
            axes[2].plot(*zip(*rss, strict=True), label="resident memory")

    return draw
