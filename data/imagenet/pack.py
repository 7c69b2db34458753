"""Adopt the codes that LlamaGen extracted from ImageNet as a data set of npp.py

    python data/imagenet/pack.py LLAMAGEN_CODES DATA [--tokenizer vq_ds16_c2i.pt]

LLAMAGEN_CODES holds imagenet{SIZE}_codes/{i}.npy (1, views, N) and imagenet{SIZE}_labels/{i}.npy
(1,). A folder ..ten_crop is followed by the views of ..ten_crop_105 beside it, where there is one.
"""

import argparse
import io
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import tokenizer
from tokenizer import BadInput


def pack(source, out, tokenizer_path):
    """Raises BadInput for the first file that is missing or wrong"""
    source = os.path.abspath(source)
    name = codes_folder(source)
    size = int(re.findall(r"\d+", name)[0])
    sources = [source]
    if source.endswith("ten_crop") and os.path.isdir(f"{source}_105"):
        sources.append(f"{source}_105")

    first = f"{source}/{name}/0.npy"
    shape = parse_array(first, read_bytes(first)).shape
    vocab = 16384
    grid = math.isqrt(shape[-1]) if shape else 0
    digest = None
    if tokenizer_path:
        model = tokenizer.load_tokenizer(tokenizer_path)
        digest = tokenizer.sha256(tokenizer_path)
        vocab = len(model.codebook())
        grid = size // model.factor
    views = shape[1] if len(shape) == 3 else 1

    labels = []
    for folder in sources:
        stacks = list(stacks_of(f"{folder}/{name.replace('codes', 'labels')}", (1,), 65536))
        labels.append(np.concatenate(stacks)[:, 0])
        if not np.array_equal(labels[-1], labels[0]):
            raise BadInput(f"{folder}: other labels, expected those beside {source}")
    labels = labels[0]
    stacks = []
    for folder in sources:
        stacks.append(stacks_of(f"{folder}/{name}", (1, views, grid**2), vocab, len(labels)))

    def codes():
        for parts in zip(*stacks):
            yield np.concatenate(parts, axis=2)[:, 0].astype(np.min_scalar_type(vocab - 1))

    meta = {"vocab": vocab, "grid": grid, "image_size": size,
            "classes": [str(i) for i in range(labels.max() + 1)],
            "tokenizer": "tokenizer.pt" if digest else None, "tokenizer_sha256": digest,
            "made_by": "data/imagenet/pack.py"}
    tokenizer.publish(out, "train", meta, codes(), labels, tokenizer_path)
    print(f"{out}: {len(labels):,} images of {len(meta['classes'])} classes, "
          f"{len(sources) * views} views of {grid} x {grid} codes")


def codes_folder(source):
    """The name of the one folder like imagenet256_codes"""
    try:
        names = sorted(os.listdir(source))
    except OSError as error:
        raise BadInput(f"{source}: cannot be read ({error.strerror})") from None
    names = [name for name in names if re.fullmatch(r"[a-z]+\d+_codes", name)]
    if len(names) != 1:
        raise BadInput(f"{source}: {names}, expected one folder like imagenet256_codes")
    return names[0]


def stacks_of(folder, shape, limit, expected=None):
    """Yield the arrays folder/{0, 1, ..}.npy, all of one shape, 1024 together (b, *shape)

    Raises BadInput for the first that is missing, of another shape, or not in 0 .. limit - 1.
    """
    try:
        found = set(os.listdir(folder))
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror})") from None
    n = expected
    if n is None:
        n = sum(name.removesuffix(".npy").isdigit() for name in found)
    wanted = {f"{i}.npy" for i in range(n)}
    if found != wanted or n == 0:
        wrong = min(found ^ wanted, key=by_number, default="0.npy")
        raise BadInput(f"{folder}/{wrong}: missing or too many, expected 0.npy to {n - 1}.npy")

    start = time.time()
    for first in range(0, n, 1024):
        paths = [f"{folder}/{i}.npy" for i in range(first, min(first + 1024, n))]
        stack = []
        with ThreadPoolExecutor(16) as pool:  # small files are waited for, 16 at once
            for path, content in zip(paths, pool.map(read_bytes, paths)):
                x = parse_array(path, content)
                right = x.shape == shape and x.dtype.kind in "iu"
                if not right or x.min() < 0 or x.max() >= limit:
                    raise BadInput(f"{path}: {x.dtype} {x.shape}, expected integers {shape} from "
                                   f"0 to {limit - 1}")
                stack.append(x)
        # No pool is open here: one that waits in a generator may be closed by the garbage
        # collector inside a thread that is just starting, and both would wait for ever.
        yield np.stack(stack)
        tokenizer.show_progress(first + len(stack), n, start)


def by_number(name):
    return len(name), name


def read_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadInput(f"{path}: missing or damaged ({error.strerror})") from None


def parse_array(path, content):
    """np.load of what was read; not in the threads, where Python 3.11's parser may fail"""
    try:
        return np.load(io.BytesIO(content))
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: missing or damaged, expected an array ({error})") from None


def main(argv=None):
    """-> exit code"""
    parser = tokenizer.Parser(description=__doc__, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="LlamaGen's folder")
    parser.add_argument("out", help="the data set")
    parser.add_argument("--tokenizer", help="the tokenizer that made the codes, if it is at hand")
    try:
        args = parser.parse_args(argv)
        pack(args.codes, args.out, args.tokenizer)
        return 0
    except BadInput as error:
        tokenizer.complain(error, "pack.py")
        return 2


if __name__ == "__main__":
    sys.exit(main())
