"""Tables and pictures of docs/reversible.md."""
