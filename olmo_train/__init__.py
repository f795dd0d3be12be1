"""olmo_train: OLMo-style pretraining, readable, exact and fast.

Importing the package takes no time: torch and the other heavy libraries are imported by the rooms that use them.
"""

import logging
import os

# OpenMP threads wait without spinning: spinning threads take cores from other processes and other threads, such as those of
# torch.compile, and make training several times slower on a busy machine. Read when torch is loaded, so import this package
# first. A setting of the user takes precedence.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if logging.lastResort:  # a caller from Python who has not set up logging sees the same lines as the command line's
    logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

__version__ = "0.1.0"
