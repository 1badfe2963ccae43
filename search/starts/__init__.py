"""Merges to begin a search with, solved from inner products: ``start: {solve: model_stock}``.

One file a solver; ``registry`` has a line for each. ``placing`` puts what they solve in a search's own segments.
"""
