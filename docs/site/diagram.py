"""Small diagrams as SVG, from boxes and arrows in YAML: `python -m docs.site.diagram`.

A file has ``title``, ``size`` [width, height], and lists of

    boxes:   {id, at: [x, y, width, height], text, tone}   lines of text are broken at "\\n"
    arrows:  {from, to, text}                              between the nearest sides of two boxes
    labels:  {at: [x, y], text, align}                     align: start (the default), middle, end

Units are pixels. ``tone`` is a key of ``TONES``. The picture has a light ground of its own, so that
it can be read on pages of either colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

__all__ = ["DIAGRAMS", "TONES", "draw"]

DIAGRAMS = Path(__file__).parents[1] / "diagrams"
# fill, stroke
TONES = {
    "plain": ("#ffffff", "#868e96"),
    "none": ("none", "none"),
    "lane": ("#f1f3f5", "#dee2e6"),
    "blue": ("#dbe4ff", "#3b5bdb"),
    "green": ("#d3f9d8", "#2b8a3e"),
    "yellow": ("#fff3bf", "#e67700"),
    "red": ("#ffe3e3", "#c92a2a"),
    "grey": ("#e9ecef", "#868e96"),
}
_LINE = 15  # px
_HEAD = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="#495057"/></marker>'  # noqa: E501  one element


def draw(diagram: Mapping[str, Any]) -> str:
    """Return the SVG. Raises KeyError for an unknown box or tone."""
    width, height = diagram["size"]
    title = escape(diagram["title"])
    boxes = diagram["boxes"]
    places = {box["id"]: box["at"] for box in boxes if "id" in box}
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{title}" '
            'font-family="system-ui, sans-serif" font-size="12">',
            f"<title>{title}</title><defs>{_HEAD}</defs>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#fafafa"/>',
            *map(_box, boxes),
            *(_arrow(places, arrow) for arrow in diagram.get("arrows", ())),
            *map(_label, diagram.get("labels", ())),
            "</svg>",
            "",
        ]
    )


def _box(box: Mapping[str, Any]) -> str:
    x, y, width, height = box["at"]
    tone = box.get("tone", "plain")
    fill, stroke = TONES[tone]
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{stroke}"/>'  # noqa: E501
    lines = box.get("text", "").split("\n")
    if tone == "lane":  # its name stands at the top
        return rect + _text(x + 10, y + 18, lines, "start", bold=True)
    top = y + height / 2 - (len(lines) - 1) * _LINE / 2 + 4
    return rect + _text(x + width / 2, top, lines, "middle")


def _arrow(places: Mapping[str, Sequence[float]], arrow: Mapping[str, Any]) -> str:
    (x1, y1), (x2, y2) = _ends(places[arrow["from"]], places[arrow["to"]])
    line = f'<path d="M{x1:g} {y1:g} {x2:g} {y2:g}" stroke="#495057" fill="none" marker-end="url(#head)"/>'  # noqa: E501
    if "text" not in arrow:
        return line
    across = abs(x2 - x1) >= abs(y2 - y1)
    x, y = (x1 + x2) / 2 + (0 if across else 6), (y1 + y2) / 2 + (-5 if across else 4)
    return line + _text(x, y, arrow["text"].split("\n"), "middle" if across else "start")


def _ends(
    a: Sequence[float], b: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Straight where the boxes face each other, else between the middles of the nearest sides."""
    ax, ay, aw, ah = a
    bx, by, bw, bh = b
    left, right = max(ax, bx), min(ax + aw, bx + bw)
    if left < right:  # one above the other
        x = (left + right) / 2
        return ((x, ay + ah), (x, by)) if ay < by else ((x, ay), (x, by + bh))
    top, bottom = max(ay, by), min(ay + ah, by + bh)
    y1, y2 = ((top + bottom) / 2,) * 2 if top < bottom else (ay + ah / 2, by + bh / 2)
    return ((ax + aw, y1), (bx, y2)) if ax < bx else ((ax, y1), (bx + bw, y2))


def _label(label: Mapping[str, Any]) -> str:
    x, y = label["at"]
    return _text(x, y, label["text"].split("\n"), label.get("align", "start"))


def _text(x: float, y: float, lines: Sequence[str], anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    spans = "".join(
        f'<tspan x="{x:g}" y="{y + number * _LINE:g}">{escape(line)}</tspan>'
        for number, line in enumerate(lines)
    )
    return f'<text text-anchor="{anchor}" fill="#212529"{weight}>{spans}</text>'


def main() -> None:
    for source in sorted(DIAGRAMS.glob("*.yaml")):
        text = draw(yaml.safe_load(source.read_text(encoding="utf-8")))
        source.with_suffix(".svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
