"""Several programs, one after the other in one process, for a single `accelerate launch`: `launched.py COMMANDS`, a JSON list of lists."""

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    for script, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
