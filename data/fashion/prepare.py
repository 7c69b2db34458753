"""The four idx files of Fashion-MNIST -> train.npz and test.npz, 32 x 32 pixels in three channels

    python data/fashion/prepare.py IDX_FOLDER OUT_FOLDER [--reference]

Images are padded with two black pixels on each side and the gray value is repeated in red, green
and blue. --reference writes only OUT_FOLDER/reference.npz, the test images once more, compressed.
"""
import gzip
import os
import sys
import zipfile

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

def main(source, out, *flags):
    os.makedirs(out, exist_ok=True)
    test = read_split(source, "t10k")
    if "--reference" not in flags:
        np.savez(os.path.join(out, "train.npz"), **read_split(source, "train"))
        np.savez(os.path.join(out, "test.npz"), **test)
        return
    # bzip2 takes half the bytes of the zip format's usual deflate here, and np.load reads it
    path = os.path.join(out, "reference.npz")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, array in test.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)

if __name__ == "__main__":
    main(*sys.argv[1:])
