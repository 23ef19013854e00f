"""How long OpenMP's threads spin while they wait for each other: set before PyTorch, which reads it, is imported."""

import os

# By default, a thread of GNU OpenMP (PyTorch's on Linux) spins for milliseconds before it sleeps. When other programs
# need the CPU, it spins away the time of the thread that it is waiting for, and training takes many times longer.
# Sleeping at once costs idle machines speed. This count is some 50 us (benchmarks/shared_cpu.py).
SPIN_COUNT = 3_000

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
