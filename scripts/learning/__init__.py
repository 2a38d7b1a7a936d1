"""How well methods learn: what is compared (arms, plans), on what (tasks), one run of each study (quality, glue), and the few-shot suite."""
