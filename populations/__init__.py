"""The records of a search: genomes, trials, evaluations, archives, fronts and the journal.

Nothing here imports torch or any other package of Ecotone.
"""
