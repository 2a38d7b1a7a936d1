"""What the steps of a run needed, by phase and category, and what each setting saves."""
