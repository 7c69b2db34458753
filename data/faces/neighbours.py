"""Are samples copies? Each beside the training image that is nearest to it in squared error

    python data/faces/neighbours.py SAMPLES.npz TRAIN.npz PICTURE.png

SAMPLES.npz is what npp.py --sample wrote. In PICTURE.png the nearest training image stands below
each of the first 40 samples. Prints how far off the nearest training images are, over all samples.
"""

import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import tokenizer  # noqa: E402


def nearest(samples, images):
    """Images (n, H, W, 3), (m, H, W, 3) -> numbers of the nearest (n,), their mean errors (n,)"""
    n = len(samples)
    samples = samples.reshape(n, -1).astype(np.float32)
    size = samples.shape[1]                                             # numbers in an image
    best = np.zeros(n, int)
    error = np.full(n, np.inf, np.float32)
    for first in range(0, len(images), 1000):
        part = images[first:first + 1000]
        part = part.reshape(len(part), -1).astype(np.float32)
        # |a - b|^2 = |a|^2 - 2 a.b + |b|^2
        lengths = np.square(samples).sum(1)[:, None] + np.square(part).sum(1)
        distances = (lengths - 2 * samples @ part.T) / size
        closest = distances.argmin(1)
        smallest = distances.min(1)
        better = smallest < error
        best[better] = first + closest[better]
        error[better] = smallest[better]
    return best, error


def main(samples_path, train_path, picture):
    samples, _, _ = tokenizer.read_npz(samples_path)
    images, _, _ = tokenizer.read_npz(train_path)
    best, error = nearest(samples, images)
    rows = []
    row_numbers = []  # one for each image
    for first in range(0, min(40, len(samples)), 10):
        some = samples[first:first + 10]
        nearest_to_them = images[best[first:first + 10]]
        for row in (some, nearest_to_them):
            row_numbers += [len(rows)] * len(row)
            rows.append(row)
    tokenizer.save_images(picture, rows, row_numbers)

    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
    low, middle, high = np.percentile(psnr, [10, 50, 90])
    print(f"{len(samples):,} images: PSNR to the nearest training image {middle:.2f} dB (median), "
          f"{low:.2f} to {high:.2f} (10 to 90 %), {psnr.max():.2f} at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
