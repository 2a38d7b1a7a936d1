"""How well methods learn: what is compared (arms, plans), on what (tasks), and one run of each study (quality, glue)."""
