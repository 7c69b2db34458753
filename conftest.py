"""The tests run on one thread: their models are so small that a second one only waits"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in what tests start
