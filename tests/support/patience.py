"""How long tests wait for other processes, in seconds: long enough for any machine, since it only ends what hangs."""

PROGRAM = 3600
COLLECTIVE = 600  # processes that wait for each other in vain fail sooner than the program that started them is given up
