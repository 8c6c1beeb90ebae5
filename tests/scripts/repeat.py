"""Do runs one after the other in one process: `python repeat.py SETTINGS.json ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings

if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(RunSettings(**json.loads(Path(name).read_text(encoding="utf-8"))), log=lambda line: None)
