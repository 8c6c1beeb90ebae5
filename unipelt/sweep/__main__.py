"""Do one run in its own process: `python -m unipelt.sweep RUN/settings.json`."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

from unipelt.runs.folder import LockedError
from unipelt.sweep.folder import read_settings
from unipelt.sweep.run_process import BUSY


def main(path: Path) -> int:
    """Do the run whose settings are in the file, and return the exit code.

    Standard input is a pipe. This process ends when the pipe is closed.
    """
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    from unipelt.glue.run import run

    try:
        run(read_settings(path))
    except LockedError:
        return BUSY
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
