"""Train one method on questions about texts: `python examples/run_qa.py configs/qa-xquad.yaml` (see `--help`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported

    from unipelt.runs.errors import exit_code
    from unipelt.runs.options import parse
    from unipelt.tasks.settings import QASettings

    what = "Train one method on questions in SQuAD's format, test it once, and leave one result.json."

    def do() -> None:
        settings = parse(argv, QASettings, what)
        from unipelt.runs.run import run  # imports PyTorch, which --help and a mistake need not wait for
        from unipelt.tasks.qa import prepare

        run(settings, prepare)

    return exit_code("run_qa.py", do)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
