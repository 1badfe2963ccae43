"""How a candidate is shown to objectives: the module that holds its weights."""
