"""`hf-memtune glue` as a script, for `accelerate launch scripts/train_glue.py configs/glue/mrpc.yaml --reversible centred`."""

import sys

from hf_memtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["glue", *sys.argv[1:]]))
