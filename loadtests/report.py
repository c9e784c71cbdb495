"""Renders the numbers of a run as tables for an 80-column terminal and as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .scenario import Slo

Rows = Sequence[Mapping[str, Any]]


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    for name, phases in report["systems"].items():
        table = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("phase", min_width=12)
        for column in ("served", "refused", "lost", "good/s", "tok/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("TTFT, s\np50/p99", justify="right", no_wrap=True)
        table.add_column("ITL, ms\np50/p99", justify="right", no_wrap=True)
        for row in _loads(phases):
            table.add_row(
                escape(row["label"]),
                *(str(row[key]) for key in ("served", "refused", "lost")),
                f"{row['goodput_per_s']:.2f}",
                f"{row['output_tok_s']:.0f}",
                _join(row["ttft_s"], 2, "/", ("p50", "p99")),
                _join(row["itl_ms"], 0, "/", ("p50", "p99")),
            )
        console.print(table)
        for header, cells in _tiers(phases):
            console.print(f"{header}: {', '.join(cells)}", markup=False)
    for header, cells in _outputs(report["outputs"]):
        console.print(f"{header}: {cells}", markup=False)
    console.print(f"good: {Slo(**report['slo'])}. TTFT: first token. ITL: gap between tokens.")
    for note in report["notes"]:
        console.print(note, style="yellow", markup=False)


def render_markdown(report: Mapping[str, Any], plot: str) -> str:
    """Return the Markdown page. ``plot``: file name of the picture beside it."""
    machine, request = report["machine"], report["request"]
    parts = [
        f"# loraplex bench {report['scenario']}",
        report["summary"],
        f"{machine['cpu']}, {machine['cores']} cores · commit {report['commit']} · "
        f"{report['began']} · seed {report['seed']} · prompts of {request['prompt_chars']} "
        f"characters, {request['max_tokens']} output tokens · the load generator runs on the same "
        "machine",
        f"Goodput counts requests with {Slo(**report['slo'])}.",
        *(f"**Note:** {note}" for note in report["notes"]),
    ]
    for name, phases in report["systems"].items():
        parts += [f"## {name}", _phase_table(_loads(phases))]
        parts += [f"{header}: {', '.join(cells)}" for header, cells in _tiers(phases)]
        families = _family_table(_loads(phases))
        if families:
            parts += ["By family:", families]
    if report["outputs"]:
        parts.append("## Outputs that differ from PEFT's")
        parts += [f"{name}: {cells}" for name, cells in _outputs(report["outputs"])]
    parts.append(f"![Curves and the server's metrics over time]({plot})")
    return "\n\n".join(parts) + "\n"


def _phase_table(rows: Rows) -> str:
    header = (
        "phase", "adapters", "served", "refused", "lost", "req/s", "goodput/s", "tok/s",
        "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms", "TTFT p50 first use / again, s",
        "adapter loads / evictions",
    )  # fmt: skip
    lines = [
        (
            row["label"], row["distinct_adapters"], row["served"], row["refused"],
            f"{row['lost']} ({row['first_error']})" if row["lost"] else 0,
            f"{row['requests_per_s']:.2f}", f"{row['goodput_per_s']:.2f}",
            f"{row['output_tok_s']:.0f}",
            _join(row["ttft_s"], 2), _join(row["itl_ms"], 0),
            f"{_number(row['first_use_ttft_s']['p50'], 2)} / "
            f"{_number(row['again_ttft_s']['p50'], 2)}",
            f"{row.get('adapter_loads', '–')} / {row.get('adapter_evictions', '–')}",
        )
        for row in rows
    ]  # fmt: skip
    return _markdown_table(header, lines)


def _family_table(rows: Rows) -> str:
    lines = [
        (
            row["label"],
            family,
            found["served"],
            _join(found["ttft_s"], 2),
            _join(found["itl_ms"], 0),
        )
        for row in rows
        for family, found in row["by_family"].items()
    ]
    header = ("phase", "family", "served", "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms")
    return _markdown_table(header, lines) if lines else ""


def _tiers(phases: Rows) -> Iterator[tuple[str, list[str]]]:
    for row in phases:
        if row["kind"] == "tiers":
            yield (
                f"{row['label']}, TTFT p50 by the adapter's tier",
                [
                    f"{tier} {1000 * found['ttft_p50_s']:.0f} ms (n={found['n']})"
                    for tier, found in row["tiers"].items()
                ],
            )


def _outputs(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    for name, rows in found.items():
        base, adapter = rows["base_rows"], rows["adapter_rows"]
        yield (
            f"{name}, wrong texts in a mixed batch",
            f"{base['wrong_texts']} of {base['n']} without adapter, "
            f"{adapter['wrong_texts']} of {adapter['n']} with",
        )


def _loads(phases: Rows) -> Rows:
    return [row for row in phases if row["kind"] == "load"]


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _join(
    values: Mapping[str, float | None],
    digits: int,
    separator: str = " / ",
    keys: Sequence[str] = ("p50", "p95", "p99"),
) -> str:
    return separator.join(_number(values[key], digits) for key in keys)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
