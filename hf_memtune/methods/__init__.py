"""Strategies: a core method applied to a model through its architecture. Each validates first, and can be removed."""
