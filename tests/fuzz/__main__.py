"""`make fuzz`: many cases against one server; prints what it found and how to see it again."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .campaign import fuzz_target

_ROUND = 1000
_MAX_FINDINGS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.cases)
    began, n_findings = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, fuzz_target(Path(folder)) as target:
        for start in range(0, len(numbers), _ROUND):
            findings = target.run(given.seed, numbers[start : start + _ROUND])
            for finding in findings:
                print(finding, flush=True)
            done = min(start + _ROUND, len(numbers))
            print(
                f"{done} cases in {time.monotonic() - began:.0f} s, "
                f"slowest {target.slowest_s:.1f} s, {dict(sorted(target.statuses.items()))}",
                flush=True,
            )
            n_findings += len(findings)
            if n_findings >= _MAX_FINDINGS or not target.is_alive():
                break
    return 1 if n_findings else 0


if __name__ == "__main__":
    sys.exit(main())
