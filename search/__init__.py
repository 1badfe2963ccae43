"""How the next candidate is chosen: the population manager's loop, and one file an algorithm."""
