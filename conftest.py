"""One thread: the suite is many small models, where a second one gains nothing and hurts beside anything else.

No test has a deadline: how long an example takes says more about the machine than about the code.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("perdure", deadline=None)
settings.load_profile("perdure")
