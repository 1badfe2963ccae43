"""How a genome becomes weights: checkpoints in, layout, Gram table, operators, materialise, checkpoints out."""
