"""Names in the result file: of parts, and of methods that others are compared with."""

EXACTNESS, PEAK_BYTES, STEP_TIME, LONGEST_ROW, OFFLOAD = "exactness", "peak bytes", "step time", "longest row", "offload"
LOGIT_FREE = "checkpointing + logit-free loss"
OFFLOADED = ", keys and values offloaded"
