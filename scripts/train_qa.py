"""`hf-memtune qa` as a script, for `accelerate launch scripts/train_qa.py configs/qa/sciq.yaml --learning_rate 4e-4`."""

import sys

from hf_memtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["qa", *sys.argv[1:]]))
