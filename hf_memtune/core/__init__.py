"""The mathematics of hf_memtune, in torch alone: scores, selection, stored keys and values, the loss of a linear head."""
