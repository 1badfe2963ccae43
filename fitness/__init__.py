"""How a candidate is measured: objectives, the worker that materialises and scores, and the pools that run workers."""

import os

# OpenMP threads that wait must not spin. Where another process wants the same core, spinning costs a factor: two
# threads that scored 1,150 small candidates a second on a shared machine score 60. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
