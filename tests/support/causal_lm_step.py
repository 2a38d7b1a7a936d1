"""The step of scripts/causal_lm_step.py, whose bytes the pages of measurements have."""

from tests.support.scripts import load

MODULE = load("causal_lm_step")
trace_causal_lm_step, CountedHost = MODULE.trace_causal_lm_step, MODULE.CountedHost
