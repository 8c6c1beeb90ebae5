"""Train one method on questions about texts: `python examples/run_qa.py configs/qa-xquad.yaml` (see `--help`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unipelt.launch import launch


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    return launch("run_qa.py", argv, "questions")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
