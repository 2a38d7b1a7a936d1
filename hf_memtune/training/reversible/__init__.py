"""Reversible layers in the trainer: put in at the start, checked, saved and loaded."""
