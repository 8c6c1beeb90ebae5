"""Train one method on one task: `python examples/run_glue.py configs/rte-apl.yaml --seed 3` (see `--help`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported

    from unipelt.glue.settings import RunSettings
    from unipelt.runs.errors import exit_code
    from unipelt.runs.options import parse

    def do() -> None:
        settings = parse(argv, RunSettings)
        from unipelt.glue.run import run  # imports PyTorch, which --help and a mistake need not wait for

        run(settings)

    return exit_code("run_glue.py", do)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
