"""How well token seeking learns: what is compared, one run of it, and what is made of the results."""
