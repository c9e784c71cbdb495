"""Makes the built pages hold a content policy without inline scripts, and small.

The theme puts a few short scripts into each page. They become files, which run at the same place.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

__all__ = ["finish"]

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
# Where the site is served is known to nobody but the server.
_CANONICAL = re.compile(r'\s*<link rel="canonical"[^>]*>')
_UNUSED = ("**/*.map", "sitemap.xml*", "assets/javascripts/lunr/**/*", "objects.inv")


def finish(site: Path) -> None:
    for pattern in _UNUSED:
        for path in sorted(site.glob(pattern), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    scripts = site / "assets" / "inline"
    scripts.mkdir(parents=True, exist_ok=True)
    for page in sorted(site.rglob("*.html")):
        text = _CANONICAL.sub("", page.read_text(encoding="utf-8"))
        # The page of a 404 is shown at any path.
        base = "/guide" if page.name == "404.html" else os.path.relpath(site, page.parent)
        text = _SCRIPT.sub(lambda match, base=base: _script(match[1], scripts, base), text)
        page.write_text(text, encoding="utf-8")


def _script(code: str, folder: Path, base: str) -> str:
    name = f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.js"
    (folder / name).write_text(code, encoding="utf-8")
    return f'<script src="{base}/assets/inline/{name}"></script>'
