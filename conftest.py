"""One thread: the suite is many small models, where a second one gains nothing and hurts beside anything else."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
