"""Reversible adapters on a classification set, against full fine-tuning, LoRA and ordinary adapters: runs, and what is made of them."""
