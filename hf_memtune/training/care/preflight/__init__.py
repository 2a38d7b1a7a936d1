"""The first minute of a run: its worst batch, tried and taken back, and whether each setting that saves memory does."""
