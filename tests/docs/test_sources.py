"""Sources of the site: links that leave docs/, diagrams, the list of error codes."""

import re
from pathlib import Path, PurePosixPath

import pytest
import yaml

from docs.site.diagram import DIAGRAMS, draw
from docs.site.reference.error_codes import error_codes
from docs.site.stage import rewrite_links

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/comparison.md", "families.md#x", "families.md#x"),
        ("docs/adr/0001-one-engine-thread.md", "../fairness.md", "../fairness.md"),
        ("docs/architecture.md", "../server/README.md", "repository/server/README.md"),
        ("docs/architecture.md", "adr", "adr/README.md"),
        ("docs/examples.md", "../examples/batch.py", "repository/examples/batch.py.txt"),
        ("server/README.md", "../docs/gpu.md#a", "../../gpu.md#a"),
        ("docs/gpu.md", "../README.md", "index.md"),
        ("docs/gpu.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/gpu.md", "#here", "#here"),
        ("docs/gpu.md", "missing.md", "missing.md"),
        ("docs/gpu.md", "../../outside.md", "../../outside.md"),
    ],
)
def test_a_link_leads_to_the_same_file_on_the_site(page: str, link: str, expected: str) -> None:
    text, _ = rewrite_links(f"See [a [b]]({link}).", PurePosixPath(page), ROOT)
    assert text == f"See [a [b]]({expected})."


def test_links_in_code_stay_as_they_are() -> None:
    code = "```\n[a](../server/README.md)\n```"
    assert rewrite_links(code, PurePosixPath("docs/gpu.md"), ROOT) == (code, [])


@pytest.mark.parametrize("source", sorted(DIAGRAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_diagram_is_drawn_from_its_source(source: Path) -> None:
    drawn = draw(yaml.safe_load(source.read_text()))
    assert drawn == source.with_suffix(".svg").read_text(), "python -m docs.site.diagram"


def test_every_error_code_of_the_page_is_one_of_the_server() -> None:
    page = (ROOT / "docs/errors.md").read_text().partition("\n## ")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", page)) - {"x_should_retry"}
    assert len(named) > 25
    assert named <= {each.code for each in error_codes()}
