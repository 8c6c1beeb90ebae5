"""Train one method on one task: `python examples/run_glue.py configs/rte-apl.yaml --seed 3` (see `--help`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported

    from unipelt.glue.failure import RunFailed
    from unipelt.glue.options import parse
    from unipelt.glue.run import run

    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"run_glue.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"run_glue.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
