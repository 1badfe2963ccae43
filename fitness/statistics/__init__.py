"""Statistics of a merge's layers, gathered over the data of calibration tasks: tensors by the layers' names.

A trial asks for them by the name of their kind (``ecotone.populations.trial.Statistics``). A worker gathers them and
leaves the tensors in its cache; the journal has their key and digest. A kind is a class in the registry
``ecotone.fitness.statistics.kinds.STATISTICS``; other packages add theirs by entry points ``ecotone.statistics``.
"""
