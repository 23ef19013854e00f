"""How long OpenMP's threads spin while they wait for each other: set before PyTorch, which reads it, is imported."""

import os
import sys

# By default, a waiting thread of GNU OpenMP (PyTorch's on Linux) spins for milliseconds. On a busy CPU, it then takes
# time from the very thread that it waits for, and training becomes several times slower. Sleeping immediately would
# slow down an idle machine. docs/experiments.md has the measurements.
SPIN_COUNT = 3_000

if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
