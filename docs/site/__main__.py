"""Builds the site into the package, where the server and the wheel find it: `make docs`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from docs.site.finish import finish
from docs.site.reference import write_reference
from docs.site.stage import rank_last, stage

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build" / "guide"


def main() -> int:
    """The exit status of MkDocs, for which warnings are errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "server/loraplex_server/guide")
    out = parser.parse_args().out.resolve()
    stage(ROOT, PAGES)
    shutil.copy(ROOT / "server/loraplex_server/console/favicon.svg", PAGES)
    write_reference(PAGES / "reference")
    rank_last(PAGES)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # see ADR 21
    done = subprocess.run([*command, "--site-dir", str(out)], cwd=ROOT, env=quiet, check=False)
    if done.returncode == 0:
        finish(out)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
