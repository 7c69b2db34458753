"""What the tests share: how they start programs, what they call refused, and small inputs"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
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


@contextmanager
def full_disk(limit=100_000):
    """No file grows beyond `limit` bytes"""
    import resource  # not on Windows
    before, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, highest))


def refuses(main, arguments, *words):
    """main(arguments) raises BadInput, and the words are in its message"""
    with pytest.raises(Exception) as caught:
        main([str(word) for word in arguments])
    assert caught.typename == "BadInput", caught.value
    for word in words:
        assert str(word) in str(caught.value)


def random_images(n, seed=0, size=16):
    """Blotches, so that features differ from image to image"""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def class_folder(folder, images, names=("a", "b")):
    """Images as PNG files in class folders, as many in each"""
    for i, image in enumerate(images):
        path = folder / names[i * len(names) // len(images)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


class RunsCode:
    """Unpickled by a careless reader, it makes the file `marker`"""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def write_pickle_with_code(path, marker):
    content = pickle.dumps({"model": RunsCode(marker)}, protocol=2)  # torch warns of newer ones
    path.write_bytes(content)
    return path
