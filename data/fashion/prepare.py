"""The four idx files of Fashion-MNIST -> train.npz and test.npz, 32 x 32 pixels in three channels

    python data/fashion/prepare.py IDX_FOLDER OUT_FOLDER

Images are padded with two black pixels on each side, and the gray value is repeated in red, green
and blue.
"""

import gzip
import os
import sys

import numpy as np

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Boot"]


def read_idx(folder, name, header):
    """-> the bytes of an idx file that follow its header"""
    with gzip.open(os.path.join(folder, name)) as file:
        content = file.read()
    return np.frombuffer(content, np.uint8, offset=header)


def convert(source, name, path):
    """The images and labels of a split of Fashion-MNIST -> an .npz"""
    images = read_idx(source, f"{name}-images-idx3-ubyte.gz", header=16)
    labels = read_idx(source, f"{name}-labels-idx1-ubyte.gz", header=8)
    labels = labels.astype(np.int64)
    images = images.reshape(-1, 28, 28)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    images = np.stack([images] * 3, axis=-1)                            # (n, 32, 32, 3)
    np.savez(path, arr_0=images, labels=labels, classes=CLASSES)


def main(source, out):
    os.makedirs(out, exist_ok=True)
    convert(source, "train", os.path.join(out, "train.npz"))
    convert(source, "t10k", os.path.join(out, "test.npz"))


if __name__ == "__main__":
    main(*sys.argv[1:])
