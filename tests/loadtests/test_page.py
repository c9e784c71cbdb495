"""The page of a bench: plots over the phases, as a reader's browser parses them."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from loadtests.page import write_page


def _row(label: str, seconds: float, tokens: float, **more: Any) -> dict[str, Any]:
    percentiles = {"p50": tokens / 10, "p95": tokens / 5, "p99": tokens / 2}
    rates = {"output_tok_s": tokens, "requests_per_s": 2.0, "goodput_per_s": 1.0}
    row = {"kind": "load", "label": label, "seconds": seconds, "served": 5, **rates}
    return {**row, "ttft_s": percentiles, "itl_ms": percentiles, **more}


def _svgs(page: str) -> list[ElementTree.Element]:
    parts = page.split("<svg")[1:]
    return [ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in parts]


def test_phases_are_as_wide_as_they_are_long_and_loads_nothing(tmp_path: Path) -> None:
    idle = {"p50": None, "p95": None, "p99": None}
    phases = [
        _row("few <b>", 10, 100.0),
        {"kind": "tiers", "label": "tiers"},
        _row("many", 30, 50.0),
        _row("none", 10, 0.0, served=0, ttft_s=idle, itl_ms=idle),
    ]
    report = {
        "scenario": "s",
        "summary": "Two & more.",
        "commit": "c",
        "began": "now",
        "seed": 1,
        "machine": {"cpu": "x", "cores": 2},
        "notes": ["<left out>"],
        "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
        "systems": {"loraplex": phases},
    }
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "://" not in page
    assert "&lt;left out&gt;" in page
    tokens, _, first, gaps = _svgs(page)
    left, right = [float(line.attrib["x1"]) for line in tokens.findall("line[@class='border']")]
    levels = tokens.findall("line[@stroke]")
    few, many, none = levels
    assert [text.text for text in tokens.findall("text[@class='phase']")] == [
        *("few <b>", "many", "none"),
    ]
    assert few.attrib["x2"] == many.attrib["x1"] == f"{left:.1f}"
    assert many.attrib["x2"] == none.attrib["x1"] == f"{right:.1f}"
    assert round((right - left) / (left - float(few.attrib["x1"]))) == 3
    assert float(few.attrib["y1"]) < float(many.attrib["y1"]) < float(none.attrib["y1"])
    for latency in (first, gaps):
        assert len(latency.findall("line[@stroke]")) == 3 * 2  # nothing was served in the third
