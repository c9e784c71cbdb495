from __future__ import annotations

import re

from typer.testing import CliRunner

from loraplex_server.cli.adapters_routing import heatmap
from loraplex_server.cli.app import app


def test_the_heatmap_has_one_line_a_place_and_one_column_an_expert() -> None:
    lines = heatmap(
        [
            {"place": "model.layers.0.mlp", "counts": [75, 25, 0, 0], "entropy": 0.406},
            {"place": "model.layers.11.mlp", "counts": [0, 0, 0, 0], "entropy": 0.0},
        ]
    )
    assert len(lines) == 3
    assert re.findall(r"\d+", lines[0].plain) == ["0", "1", "2", "3"]
    assert lines[1].plain.startswith("0 mlp")
    assert re.findall(r"[\d.]+", lines[1].plain) == ["0", "75", "25", "0", "0", "0.406"]
    assert len({str(span.style) for span in lines[1].spans}) > 2  # colours follow the shares
    assert lines[2].plain.startswith("11 mlp")


def test_a_server_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(app, ["adapters", "routing", "x", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "cannot reach http://127.0.0.1:9" in result.output
