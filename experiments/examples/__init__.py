"""Data and models of the ready recipes."""
