"""The levers: the settings that save memory, one row each, and what follows from a row."""
