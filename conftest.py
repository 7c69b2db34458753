"""What the tests share: how they start programs, what they call refused, and small inputs"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# One thread: the models are so small that a second one only waits. torch reads this when it is
# imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts the tests in the background has SIGINT ignored. The processes that tests start
# would inherit that, and some tests send them one.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).resolve().parent
STARTED = []  # the processes of the current test


@pytest.fixture(autouse=True)
def seeded():
    import torch  # after OMP_NUM_THREADS is set
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails does not leave its processes running"""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def flags(**values):
    """flags(n=5) is ["--n", "5"]"""
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def start(*command, **environment):
    """Python in a process of its own, as in start("npp.py", "--model", "B")"""
    command = [str(word) for word in command]
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, **environment))
    STARTED.append(process)
    return process


def start_two_ranks(*command):
    """Two processes of a command, with what torchrun puts into their environment"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(*command, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in ("0", "1")]


def start_on_full_disk(program, *arguments, limit=100_000):
    """The program in a process that cannot write files of more than `limit` bytes"""
    code = ("import resource, runpy, sys\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            f"sys.argv[0] = {program!r}\n"
            f"runpy.run_path({program!r}, run_name='__main__')\n")
    return start("-c", code, *arguments)


def refuses(main, arguments, *words):
    """main(arguments) raises BadInput, and the words are in its message"""
    with pytest.raises(Exception) as caught:
        main([str(word) for word in arguments])
    assert caught.typename == "BadInput", caught.value
    for word in words:
        assert str(word) in str(caught.value)


def write_images(folder, classes=("cats", "dogs"), n=3, size=16, suffix="png"):
    """A folder with n random pictures in each class, size x size or a little wider"""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(255, size=(size, size + i % 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}")
    return folder


class RunsCode:
    """Unpickled by a careless reader, it makes the file `marker`"""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def write_pickle_with_code(path, marker):
    path.write_bytes(pickle.dumps({"model": RunsCode(marker)}))
    return path
