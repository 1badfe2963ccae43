"""How a candidate is measured: objectives, the worker that materialises and scores, and the pools that run workers."""
