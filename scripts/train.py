"""`hf-memtune train` as a script, for `accelerate launch scripts/train.py configs/lm/seek.yaml --token_ratio 0.2`."""

import sys

from hf_memtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
