"""What the tests need of the process that they run in"""

import os
import signal

# One thread: the models are so small that a second one only waits. It is read when torch is
# imported, here and in what tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts the tests in the background has SIGINT ignored. The processes that tests start
# would inherit that, and some tests send them one.
signal.signal(signal.SIGINT, signal.default_int_handler)
