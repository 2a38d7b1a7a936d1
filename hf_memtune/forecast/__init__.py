"""What a step would need, before there is one: the trainer's own loop on tensors without values, and a ladder of settings."""
