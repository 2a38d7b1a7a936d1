"""When memory runs out all the same: the step again in halves, and advice."""
