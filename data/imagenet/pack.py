"""Adopt the codes that LlamaGen extracted from ImageNet as a data set of npp.py

    python data/imagenet/pack.py LLAMAGEN_CODES DATA [--tokenizer vq_ds16_c2i.pt]

LLAMAGEN_CODES holds imagenet{SIZE}_codes/{i}.npy (1, views, N) and imagenet{SIZE}_labels/{i}.npy
(1,). A folder ..._ten_crop is followed by the views of ..._ten_crop_105 beside it, if there is one.

The classes are called 0, 1, 2, ... Before `tokenizer.py encode --split val` adds class folders, put
their names into DATA/meta.json.
"""

import io
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import tokenizer
from tokenizer import BadInput, require


def pack(source, out, tokenizer_path):
    """Raises BadInput for the first file that is missing or wrong"""
    tokenizer.check_new(out, "train")
    source = Path(source).resolve()
    folders = sorted(source.glob("*[0-9]_codes"))
    require(len(folders) == 1, f"{source}: expected one folder like imagenet256_codes")
    name = folders[0].name
    size = int(re.findall(r"\d+", name)[0])
    sources = [source]
    second = Path(f"{source}_105")
    if source.name.endswith("ten_crop") and second.is_dir():
        sources.append(second)

    shape = parse(*read([source / name / "0.npy"])[0]).shape
    require(len(shape) == 3, f"{source / name / '0.npy'}: {shape}, expected (1, views, N)")
    views = shape[1]
    grid = math.isqrt(shape[2])
    vocab = 16384
    digest = None
    if tokenizer_path:
        model = tokenizer.load_tokenizer(tokenizer_path)
        digest = tokenizer.sha256(tokenizer_path)
        vocab = len(model.codebook())
        grid = size // model.factor

    tokenizer.check_output(f"{out}/meta.json")
    n = len(list(folders[0].iterdir()))
    labels = []
    for folder in sources:
        of_labels = folder / name.replace("codes", "labels")
        labels.append(np.concatenate(list(stacks(of_labels, n, (1,), 65536)))[:, 0])
        require(np.array_equal(labels[-1], labels[0]), f"{of_labels}: not those of {source}")
    labels = labels[0]

    def codes():
        pairs = zip(*[stacks(folder / name, n, (1, views, grid**2), vocab) for folder in sources])
        for parts in pairs:
            yield np.concatenate(parts, axis=2)[:, 0].astype(np.min_scalar_type(vocab - 1))

    meta = {"vocab": vocab, "grid": grid, "image_size": size,
            "classes": [str(i) for i in range(labels.max() + 1)],
            "tokenizer": "tokenizer.pt" if digest else None, "tokenizer_sha256": digest}
    tokenizer.check_classes(source, labels, meta["classes"])
    tokenizer.publish(out, "train", meta, codes(), labels, tokenizer_path)
    print(f"{out}: {n:,} images of {len(meta['classes'])} classes, "
          f"{len(sources) * views} views of {grid} x {grid} codes")


def stacks(folder, n, shape, limit):
    """Yield the n arrays folder/{i}.npy, 1024 at a time (b, *shape)

    Raises BadInput for the first that is missing, of another shape, or not in 0 to limit - 1.
    """
    found = len(list(folder.glob("*")))
    require(found == n, f"{folder}: {found} files, expected {n}")
    paths = [folder / f"{i}.npy" for i in range(n)]
    for first in range(0, n, 1024):
        arrays = []
        for path, content in read(paths[first : first + 1024]):
            x = parse(path, content)
            require(x.shape == shape and x.dtype.kind in "iu" and x.min() >= 0 and x.max() < limit,
                    f"{path}: {x.dtype} {x.shape}, expected integers {shape} from 0 to {limit - 1}")
            arrays.append(x)
        yield np.stack(arrays)
        print(f"{folder.name}: {first + len(arrays):,} of {n:,}", end="\r", flush=True)


def read(paths):
    """-> [(path, its bytes)], 16 at once: small files on a network are mostly waited for"""
    try:
        with ThreadPoolExecutor(16) as pool:
            return list(zip(paths, pool.map(Path.read_bytes, paths)))
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror})") from None


def parse(path, content):
    """np.load of what was read; not in the threads, where Python 3.11's parser may fail"""
    with tokenizer.expecting(path, "an array"):
        return np.load(io.BytesIO(content))


def main(argv=None):
    """-> exit code. Raises BadInput."""
    parser = tokenizer.Parser(description=__doc__)
    parser.add_argument("codes", help="LlamaGen's folder")
    parser.add_argument("out", help="the data set")
    parser.add_argument("--tokenizer", help="the tokenizer that made the codes, if it is at hand")
    args = parser.parse_args(argv)
    pack(args.codes, args.out, args.tokenizer)
    return 0


if __name__ == "__main__":
    tokenizer.run_program(main, "pack.py")
