"""How a candidate is measured: objectives, the worker that materialises and scores, and the pools that run workers."""

import os

# OpenMP threads that wait spin for some tens of microseconds only, which bridges the gap between two operations of a
# small model, and then sleep. Measured with two threads on a 64-256-10 network: 2,300 candidates a second so, 560 when
# they sleep at once; and on a machine that others use too, 60 when they spin for long. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
