"""What the tests need of the process that they run in"""

import os
import signal

# One thread: the models are so small that a second one only waits. It is read when torch is
# imported, here and in what tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts the tests in the background has SIGINT ignored. The processes that tests start
# would inherit that, and some tests send them one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# nohup has SIGHUP ignored, which is inherited in the same way. A handler is not, and with this one
# the tests still go on when their terminal closes.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
