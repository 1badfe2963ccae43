"""Preparing the vectors that an operator makes of whole matrices, before a search begins."""
