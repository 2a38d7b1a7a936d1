"""What is measured on a GPU: scripts/bench_gpu.py."""
