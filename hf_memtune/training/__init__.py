"""The Trainer, its settings and its callbacks: they wire the strategies, and compute nothing themselves."""
