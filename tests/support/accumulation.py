"""What the tests of accumulation share with others."""

LOGGED = 1e-6  # transformers adds up the logged losses in float32
