"""Train one method on translations: `python examples/run_translation.py configs/translation-multi30k.yaml`.

`--help` lists every option.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported

    from unipelt.runs.errors import exit_code
    from unipelt.runs.options import parse
    from unipelt.runs.run import run
    from unipelt.tasks.settings import TranslationSettings
    from unipelt.tasks.translation import prepare

    what = "Train one method on texts and their translations, test it once, and leave one result.json."
    return exit_code("run_translation.py", lambda: run(parse(argv, TranslationSettings, what), prepare))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
