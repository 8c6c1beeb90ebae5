"""`run_glue.py` in a process of several, the second of which fails in its fourth training step."""

from __future__ import annotations

import os
import sys
from typing import Any

from transformers import Trainer

from unipelt.launch import launch

_step = Trainer.training_step
_calls = 0


def _fail(self: Trainer, *args: Any, **options: Any) -> Any:
    global _calls
    _calls += 1
    if _calls == 4 and os.environ["RANK"] == "1":
        raise OSError("no room for process 1")
    return _step(self, *args, **options)


if __name__ == "__main__":
    Trainer.training_step = _fail  # type: ignore[method-assign]
    sys.exit(launch("run_glue.py", sys.argv[1:], "classification"))
