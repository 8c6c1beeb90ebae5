"""Train one method on translations: `python examples/run_translation.py configs/translation-multi30k.yaml`.

`--help` lists every option.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unipelt.launch import launch


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    return launch("run_translation.py", argv, "translation")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
