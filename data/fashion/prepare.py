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

def read_idx(path, header, shape):
    with gzip.open(path) as f:
        return np.frombuffer(f.read(), np.uint8, offset=header).reshape(shape)

def read_split(folder, name):
    images = read_idx(os.path.join(folder, f"{name}-images-idx3-ubyte.gz"), 16, (-1, 28, 28))
    labels = read_idx(os.path.join(folder, f"{name}-labels-idx1-ubyte.gz"), 8, -1)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return {"arr_0": np.stack([images] * 3, axis=-1), "labels": labels.astype(np.int64),
            "classes": np.array(CLASSES)}

def main(source, out):
    os.makedirs(out, exist_ok=True)
    np.savez(os.path.join(out, "train.npz"), **read_split(source, "train"))
    np.savez(os.path.join(out, "test.npz"), **read_split(source, "t10k"))

if __name__ == "__main__":
    main(*sys.argv[1:])
