"""What the programs share: flags, errors of one line, ranks, random keys, files and pictures"""

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported once there is a group, it keeps its threads until exit
from einops import rearrange
from PIL import Image

class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""

class Parser(argparse.ArgumentParser):
    """Flags with a default each, that set their type, and errors of one line"""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def add_flag(self, name, default, text):
        how = {bool: dict(action="store_true"), tuple: dict(type=integers, metavar="1,2,..")}.get(
            type(default), dict(type=type(default), metavar=default))
        self.add_argument(f"--{name}", default=default, help=text, **how)

    def given(self, config, argv):
        """A flag for each field of a dataclass, the comment beside it as help -> those in argv"""
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
        for f in fields(config):
            self.add_flag(f.name, f.default, comments[f.name])
        self.set_defaults(**dict.fromkeys(comments))                      # to see which are given
        return {k: v for k, v in vars(self.parse_args(argv)).items() if v is not None}

    def error(self, message):
        raise BadInput(message)

def integers(text):
    return tuple(int(x) for x in text.split(","))

def one_line_errors(main):
    """main(argv) -> exit code, made to print bad input as one line on stderr and return 2"""
    @wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (BadInput, OSError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OSError):
                print(f"{os.path.basename(main.__code__.co_filename)}: {error}", file=sys.stderr)
            return 2
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped

class Machine:
    """This process: its device, and its rank among the `world` that torchrun started"""
    def __init__(self, dtype="float32"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.gpu, self.device = torch.cuda.is_available(), torch.device("cpu")
        if self.gpu:
            local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if local > gpus:
                raise BadInput(f"{local} processes here, expected one for each GPU: {gpus}")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.gpu else "gloo")
        self.bfloat16 = self.gpu if dtype == "auto" else dtype == "bfloat16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def mean(self, values):
        """float tensor -> its mean over the ranks"""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def wait(self):
        """Until all ranks are here"""
        self.mean(torch.zeros(1))

    def gather(self, array):
        """An array of one shape on all ranks -> [that of each] on rank 0, [] on the others"""
        if self.world == 1:
            return [array]
        mine = torch.from_numpy(array)
        parts = [torch.empty_like(mine) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(mine, parts)
        return [part.numpy() for part in parts or []]

def check_ranges(flags, ranges):
    """Raise BadInput for the first of `flags` out of its range. ranges: {range: names}, where what
    is no range of numbers lists the words that are allowed."""
    numbers = {"0 or more": lambda x: 0 <= x < math.inf, "1 or more": lambda x: 1 <= x < math.inf,
               "more than 0": lambda x: 0 < x < math.inf, "0 to 1": lambda x: 0 <= x <= 1}
    for expected, names in ranges.items():
        right = numbers.get(expected, expected.split(", ").__contains__)
        for name in names.split():
            if not right(value := getattr(flags, name)):
                raise BadInput(f"{name} is {value}, expected {expected}")

def class_numbers(text, names, most=10):
    """Names or numbers with commas -> their numbers (n,) int64; by default at most `most` classes,
    spread evenly. Raises BadInput."""
    numbers = [str(i) for i in range(len(names))]
    spread = np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)
    try:
        return torch.tensor([names.index(c) if c in names else numbers.index(c)
                             for c in text.split(",")] if text else spread)
    except ValueError:
        raise BadInput(f"classes is {text}, expected names like {names[0]}, or numbers from 0 to "
                       f"{len(names) - 1}") from None

@contextmanager
def stop_signals():
    """Within, SIGINT and SIGTERM do nothing but join the list that this yields"""
    seen, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: seen.append(number)) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

def status(line, last=False, file=None):
    """Show a line in place on a terminal, until the last, and in a file one below the other"""
    file = file or sys.stdout
    if file.isatty():
        print(f"\r{line:<79}", end="\n" if last else "", file=file, flush=True)
    else:
        print(line, file=file, flush=True)

def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes > 99 else (
        f"{minutes}:{seconds:02}")

def progress(done, before, total, began, file=None):
    """Show how many of `total` images are done, of which `before` were when it `began`"""
    speed = max(done - before, 1) / (time.time() - began)
    left = clock((total - done) / speed)
    status(f"{done:,} of {total:,} images  {speed:,.1f} img/s  {left} left", done == total, file)

def brief(error):
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:200]

def load_file(path):
    """torch.load to the CPU of tensors and plain values: a pickle with code in it is refused"""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in official checkpoints
            mapped = zipfile.is_zipfile(path)  # then only what is used is read, once for all ranks
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # missing, truncated, foreign: torch has no common class for these
        raise BadInput(f"{path}: cannot be read as a checkpoint ({brief(error)})") from None

def write_atomically(path, write):
    """write(file) beside `path`, then rename: a crash or a full disk leaves the old file intact"""
    part = f"{path}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # those are the words of torch.save for a full disk
        raise BadInput(f"{path}: cannot be written, nothing is changed ({brief(error)})") from None
    finally:
        if os.path.exists(part):
            os.remove(part)

def open_array(path, types, shape, limit):
    """Memory-map a .npy file of one of these types, this shape (-1: any), and 0 <= values < limit

    Raises BadInput."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: missing or damaged, expected an array ({brief(error)})") from None
    fits = array.ndim == len(shape) and all(b in (-1, a) for a, b in zip(array.shape, shape))
    if array.dtype.name not in types.split() or not fits or not array.size:
        raise BadInput(f"{path}: {array.dtype} {array.shape}, expected {types} {shape}")
    if array.max() >= limit or array.dtype.kind == "i" and array.min() < 0:  # a pass over the file
        raise BadInput(f"{path}: {array.min()} to {array.max()}, expected 0 to {limit - 1}")
    return array

class Codes:
    """A folder that `tokenizer.py encode` wrote; "none" is ImageNet's shape, without codes

    codes (n, views, N) uint8 or uint16, memory-mapped; labels (n,); val: codes (m, N) and labels to
    validate on, or None; facts: what a checkpoint must know. Raises BadInput."""
    def __init__(self, path, image_size=256):
        self.path, self.val, self.facts = path, None, dict(
            vocab=16384, grid=image_size // 16, image_size=image_size, images=1_281_167,
            classes=[str(i) for i in range(1000)], tokenizer=None, tokenizer_sha256=None)
        if path == "none":
            return
        try:
            with open(os.path.join(path, "meta.json")) as f:
                meta = json.load(f)
            self.facts.update((k, meta[k]) for k in self.facts if k != "images")
            if meta["tokenizer"]:
                self.facts["tokenizer"] = os.path.join(path, meta["tokenizer"])
            self.codes, self.labels = self.split("")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path}: expected a folder with a meta.json ({brief(e)})") from None
        self.facts["images"] = len(self.codes)
        if os.path.exists(os.path.join(path, "codes_val.npy")):
            codes, labels = self.split("_val")
            rows = np.linspace(0, len(codes) - 1, min(2048, len(codes))).astype(int)
            self.val = [torch.from_numpy(x).long() for x in (codes[rows, 0], labels[rows])]

    def split(self, suffix):
        """Codes and labels of one split, every value held against meta.json"""
        facts, path = self.facts, os.path.join(self.path, "{}" + suffix + ".npy").format
        shape = -1, -1, facts["grid"] ** 2
        codes = open_array(path("codes"), "uint8 uint16", shape, facts["vocab"])
        types, classes = "uint8 uint16 int32 int64", len(facts["classes"])
        return codes, open_array(path("labels"), types, codes.shape[:1], classes)

def cut_log(path, step):
    """Drop the lines of a log after `step`, and one that a crash left half-written"""
    lines = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            lines = [x for x in f if x.endswith(b"}\n") and json.loads(x)["step"] <= step]
    write_atomically(path, lambda f: f.writelines(lines))

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def generator(*key):
    """Random numbers that are a pure function of a key of integers, such as (seed, step)"""
    return np.random.Generator(np.random.PCG64(key))

def to_uint8(images):
    """Images in [-1, 1] (B, 3, H, W) -> uint8 array (B, H, W, 3), truncated as LlamaGen does"""
    images = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(images, "b c h w -> b h w c").cpu().numpy()

def from_uint8(images):
    """uint8 array (B, H, W, 3) -> float32 tensor in [-1, 1] (B, 3, H, W)"""
    return rearrange(torch.from_numpy(images), "b h w c -> b c h w").float() / 127.5 - 1

def save_grid(path, images, columns, scale=1):
    """One PNG of uint8 images (n, H, W, 3), row by row; every pixel becomes scale x scale"""
    n, h, w, _ = images.shape
    sheet = np.full((-(-n // columns) * columns, h + 1, w + 1, 3), 255, np.uint8)  # white between
    sheet[:n, :h, :w] = images
    sheet = rearrange(sheet, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)[:-1, :-1]
    picture = Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))
    write_atomically(path, lambda f: picture.save(f, format="PNG"))

def save_rows(path, chunks, rows):
    """One PNG, a class a row, of chunks of uint8 images (b, H, W, 3) whose classes come in turn"""
    images = rearrange(np.concatenate(list(chunks)), "(i c) h w rgb -> (c i) h w rgb", c=rows)
    save_grid(path, images, len(images) // rows, scale=max(1, 64 // images.shape[1]))

def save_npz(path, chunks, shape, labels):
    """Stream uint8 images of a known total shape (n, H, W, 3) into arr_0 of an .npz, with labels"""
    def write(f):
        with zipfile.ZipFile(f, "w") as z:
            with z.open("arr_0.npy", "w", force_zip64=True) as member:
                header = dict(descr="|u1", fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(member, header)
                for images in chunks:
                    member.write(images.tobytes())
            with z.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, labels)

    write_atomically(path, write)

def watched(chunks, n):
    """Pass chunks of n images on, and show how many there were and the time left"""
    began, done = time.time(), 0
    for images in chunks:
        yield images
        done += len(images)
        progress(done, 0, n, began)
