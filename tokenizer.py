"""Images to codes and back: the VQGAN of LlamaGen

An encoder shrinks the image by a factor f. Each of the h x w vectors that are left is replaced by
the nearest vector of a codebook; its index is the code. A decoder turns codes back into an image.

    python tokenizer.py train IMAGES tokenizer.pt --image_size 32     # a small one of your own
    python tokenizer.py encode IMAGES DATA --tokenizer tokenizer.pt   # codes for npp.py --data DATA
    python tokenizer.py encode IMAGES_VAL DATA --tokenizer tokenizer.pt --split val
    torchrun --nproc_per_node=8 -- tokenizer.py encode IMAGENET DATA --tokenizer vq_ds16_c2i.pt \\
        --views ten_crop --scales 1.1,1.05                            # as LlamaGen prepares it
    python tokenizer.py show DATA codes.png                           # what stored codes decode to
    python tokenizer.py reconstruct IMAGES out.png --tokenizer tokenizer.pt    # before/after, PSNR
    python tokenizer.py reconstruct IMAGES out.npz --tokenizer tokenizer.pt    # for fid.py

IMAGES is a folder with one sub-folder per class, its images at any depth, or an .npz of `arr_0`
uint8 (n, H, W, 3), `labels` (n,) and, optionally, `classes`, their names.

Shapes: B images of S x S pixels, h = w = S/f codes per side, D dimensions of a codebook vector.
"""

import argparse
import glob
import hashlib
import inspect
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from datetime import timedelta
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

# ---- 1. Files ------------------------------------------------------------------------------------

class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""


def require(condition, message):
    if not condition:
        raise BadInput(message)


@contextmanager
def expecting(path, what):
    """Turns any error inside the `with` into BadInput: the file is not `what`"""
    try:
        yield
    except BadInput:
        raise
    except pickle.UnpicklingError:  # torch's message suggests running the code in the file
        raise BadInput(f"{path}: expected {what}, found damage, another format, or code") from None
    except Exception as error:  # each kind of damage raises its own
        raise BadInput(f"{path}: expected {what} ({error!r:.300})") from None


@contextmanager
def reading(path, what):
    """Yield what a .pt file holds, tensors on the CPU; no code in it is run. Errors as above."""
    with expecting(path, f"{what} in a .pt file"):
        is_zip = zipfile.is_zipfile(path)
        if is_zip:  # torch.load does not notice a flipped bit
            with zipfile.ZipFile(path) as archive:
                require(archive.testzip() is None, f"{path}: damaged, wrong checksum")
        # The official training checkpoints carry their flags as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = is_zip and os.name != "nt"  # Windows does not replace a file that is mapped
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        yield saved


def check_output(path):
    """Raises BadInput now, not after the work, if `path` cannot be written"""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None
    require(not os.path.isdir(path), f"{path}: cannot be written (it is a folder)")


def replace_file(path, write):
    """Call write(file) on a new file, then rename it: a kill or a full disk keeps the old one

    Raises BadInput if the file cannot be written.
    """
    check_output(path)
    with suppress(OSError):  # another process may clean up too
        for part in glob.glob(f"{glob.escape(str(path))}.*.part"):
            if os.path.getmtime(part) < time.time() - 3600:  # left by a process that was killed
                os.remove(part)
    part = f"{path}.{os.getpid()}.part"  # two processes never write to the same file
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind a RuntimeError.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise BadInput(f"{path}: cannot be written ({reason.strerror})") from None
        raise
    finally:
        with suppress(FileNotFoundError):  # it has been renamed
            os.remove(part)


def write_array(file, chunks, n):
    """Stream arrays (b, ...), n rows in total, into one .npy"""
    for i, chunk in enumerate(chunks):
        if i == 0:
            header = np.lib.format.header_data_from_array_1_0(chunk)
            header["shape"] = (n,) + chunk.shape[1:]
            np.lib.format.write_array_header_1_0(file, header)
        file.write(chunk.tobytes())


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_uint8(images):
    """Images in [-1, 1] (B, 3, H, W) -> uint8 array (B, H, W, 3), truncated as in LlamaGen"""
    images = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(images, "b c h w -> b h w c").cpu().numpy()


def from_uint8(images):
    """uint8 array (B, H, W, 3) -> float32 tensor in [-1, 1] (B, 3, H, W)"""
    return rearrange(torch.from_numpy(images), "b h w c -> b c h w").float() / 127.5 - 1


# ---- 2. The model, its parts named as in the published vq_ds16_c2i.pt and vq_ds8_c2i.pt ----------

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = norm(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """One head, every position sees every other: (B, c, H, W) -> (B, c, H, W)"""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.norm(x)
        q = rearrange(self.q(y), "b c h w -> b 1 (h w) c")
        k = rearrange(self.k(y), "b c h w -> b 1 (h w) c")
        v = rearrange(self.v(y), "b c h w -> b 1 (h w) c")
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Level(nn.Module):
    """Residual blocks at one resolution, attention behind each if asked, then maybe a resampling"""

    def __init__(self, c_in, c_out, blocks, attention=False, down=False, up=False):
        super().__init__()
        self.res = nn.ModuleList([ResBlock(c_in, c_out)])
        for _ in range(blocks - 1):
            self.res.append(ResBlock(c_out, c_out))
        self.attn = nn.ModuleList()
        if attention:
            self.attn.extend(AttnBlock(c_out) for _ in range(blocks))
        self.downsample = nn.Sequential()
        if down:  # pads right and bottom only, as the published weights were trained
            self.downsample.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.downsample.conv = nn.Conv2d(c_out, c_out, 3, stride=2)
        self.upsample = nn.Sequential()
        if up:
            self.upsample.nearest = nn.Upsample(scale_factor=2.0)
            self.upsample.conv = conv3x3(c_out, c_out)

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def encoder(ch, ch_mult, z_channels):
    """Images (B, 3, S, S) -> features (B, z_channels, h, w)"""
    widths = [ch] + [ch * multiple for multiple in ch_mult]
    width = widths[-1]
    last = len(ch_mult) - 1
    parts = nn.Sequential()  # it runs its parts in the order they are assigned
    parts.conv_in = conv3x3(3, ch)
    parts.conv_blocks = nn.Sequential()
    for i in range(len(ch_mult)):
        level = Level(widths[i], widths[i + 1], 2, attention=i == last, down=i < last)
        parts.conv_blocks.append(level)
    parts.mid = nn.Sequential(ResBlock(width, width), AttnBlock(width), ResBlock(width, width))
    parts.norm_out = norm(width)
    parts.swish = nn.SiLU()
    parts.conv_out = conv3x3(width, z_channels)
    return parts


def decoder(ch, ch_mult, z_channels):
    """Features (B, z_channels, h, w) -> images (B, 3, S, S): the encoder's levels backwards"""
    width = ch * ch_mult[-1]
    widths = [width] + [ch * multiple for multiple in reversed(ch_mult)]
    last = len(ch_mult) - 1
    parts = nn.Sequential()
    parts.conv_in = conv3x3(z_channels, width)
    parts.mid = nn.Sequential(ResBlock(width, width), AttnBlock(width), ResBlock(width, width))
    parts.conv_blocks = nn.Sequential()
    for i in range(len(ch_mult)):
        level = Level(widths[i], widths[i + 1], 3, attention=i == 0, up=i < last)
        parts.conv_blocks.append(level)
    parts.norm_out = norm(widths[-1])
    parts.swish = nn.SiLU()
    parts.conv_out = conv3x3(widths[-1], 3)
    return parts


class VQModel(nn.Module):
    """LlamaGen's image tokenizer. The defaults are VQ-16; ch_mult (1, 2, 2, 4) makes it VQ-8."""

    def __init__(self, codebook_size=16384, codebook_dim=8, ch=128, ch_mult=(1, 1, 2, 2, 4),
                 z_channels=256):
        super().__init__()
        self.factor = 2 ** (len(ch_mult) - 1)  # pixels per code, along each side
        self.encoder = encoder(ch, ch_mult, z_channels)
        self.decoder = decoder(ch, ch_mult, z_channels)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codebook_size, codebook_dim)})
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)

    def codebook(self):
        """The codebook as unit vectors (codebook_size, D): only their direction counts"""
        return F.normalize(self.quantize["embedding"].weight, dim=-1)

    def features(self, images):
        """Images (B, 3, S, S) -> unit vectors (B, h, w, D)"""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(rearrange(z, "b d h w -> b h w d"), dim=-1)

    def nearest(self, z):
        """Unit vectors (..., D) -> the codes of the nearest vectors of the codebook (...)"""
        similarity = z @ self.codebook().T  # for unit vectors: |z - q|^2 = 2 - 2 z.q
        return similarity.argmax(-1)

    def render(self, q):
        """Unit vectors (B, h, w, D) -> images (B, 3, S, S)"""
        return self.decoder(self.post_quant_conv(rearrange(q, "b h w d -> b d h w")))

    @torch.no_grad()
    def encode(self, images):
        """Images in [-1, 1] (B, 3, S, S), S a multiple of `factor` -> codes (B, h, w) int64"""
        return self.nearest(self.features(images))

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, h, w) -> images (B, 3, S, S), roughly in [-1, 1]; to_uint8 clamps"""
        q = rearrange(self.codebook()[codes], "b h w d -> b d h w")
        # Contiguous: on a CPU, GroupNorm is less accurate in channels-last layout.
        return self.decoder(self.post_quant_conv(q.contiguous()))

    def pixels(self, codes, size=0):
        """Codes (B, N) -> uint8 array (B, S, S, 3), or (B, size, size, 3) if size is not 0"""
        codes = rearrange(codes, "b (h w) -> b h w", h=math.isqrt(codes.shape[1]))
        images = torch.cat([self.decode(piece) for piece in codes.split(25)])  # to fit in memory
        if size:
            images = F.interpolate(images, (size, size), mode="bicubic")
        return to_uint8(images)


def load_tokenizer(path, device="cpu", meta=None):
    """A VQModel in eval mode from a file of ours or LlamaGen's, {"model": state_dict}

    Its sizes are read off the tensors; image_size is that of the training images. meta: of the
    codes to decode; its vocab and tokenizer_sha256, if present, must match. Raises BadInput.
    """
    with reading(path, "LlamaGen's tokenizer") as saved:
        state = saved["model"].copy()
        state.pop("quantize.codebook_used", None)  # statistics of LlamaGen's training
        codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
        ch = len(state["encoder.conv_in.bias"])
        z_channels = len(state["encoder.conv_out.bias"])
        biases = [f"encoder.conv_blocks.{level}.res.0.conv1.bias" for level in range(9)]
        ch_mult = [len(state[name]) // ch for name in biases if name in state]  # of up to 9 levels
        model = VQModel(codebook_size, codebook_dim, ch, ch_mult, z_channels)
        model.load_state_dict(state)
        model.image_size = saved.get("image_size", 256)  # LlamaGen's file does not say
    require(codebook_size <= 65536, f"{path}: {codebook_size} codes, expected at most 65536")
    if meta:
        vocab = meta.get("vocab")
        require(vocab in (None, codebook_size), f"{path}: {codebook_size} codes, expected {vocab}")
        digest = sha256(path)
        expected = meta.get("tokenizer_sha256")
        require(expected in (None, digest), f"{path}: sha256 {digest}, but another tokenizer made "
                                            f"the codes, sha256 {expected}")
    return model.to(device).eval()


# ---- 3. Images -----------------------------------------------------------------------------------

def center_crop(image, size):
    """PIL image -> size x size as ADM prepares ImageNet: halve by a box filter while the short side
    is at least twice the size, bicubic to the size, crop the centre. EXIF rotation is ignored.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image):
    """PIL image -> mode RGB, transparent pixels white

    Raises ValueError for float and 32-bit integers: which value is white would be a guess.
    """
    if image.mode.startswith("I;16"):  # keep the high byte, as Pillow does for 16-bit colour
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, expected 8 or 16 bits per channel")
    if image.has_transparency_data:  # ADM's bare convert("RGB") shows the colour hidden below
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class Images:
    """The images of a folder of class folders or an .npz, center-cropped to each of `sizes`

    items: file names or arrays; labels: int64 (n,), set to -1 where reading finds an unreadable
    image; classes: the class names. Raises BadInput.
    """

    def __init__(self, source, sizes):
        self.source = source
        self.sizes = sizes
        require(os.path.exists(source), f"{source}: not found, expected a folder or an .npz")
        read = read_folder if os.path.isdir(source) else read_npz
        self.items, self.labels, self.classes = read(source)
        require(len(self.items) > 0, f"{source}: no images, expected one sub-folder per class")

    def load(self, i):
        """-> one uint8 (S, S, 3) per size, black ones if the image is unreadable"""
        item = self.items[i]
        try:
            if isinstance(item, str):
                with Image.open(item) as file:
                    image = to_rgb(file)
            else:
                image = Image.fromarray(item)
            return [np.asarray(center_crop(image, size)) for size in self.sizes]
        except Exception as error:  # Pillow raises many kinds
            name = item if isinstance(item, str) else f"image {i} of {self.source}"
            complain(f"{name}: unreadable image ({error!r})")
            self.labels[i] = -1
            return [np.zeros((size, size, 3), np.uint8) for size in self.sizes]

    def read(self, chunks):
        """Yield what `load` returns for each chunk of indices, while threads read the next chunk"""
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        pool = ThreadPoolExecutor(max(1, cores))  # a `with` would wait if the caller stops early
        ahead = []
        for chunk in chunks:
            ahead.append(pool.map(self.load, chunk))
            if len(ahead) > 1:
                yield list(ahead.pop(0))
        yield from map(list, ahead)

    def fingerprint(self):
        """Changes when an image is added, removed or replaced"""
        digest = hashlib.sha256()
        for path in self.items if isinstance(self.items, list) else [self.source]:
            status = os.lstat(path)  # of a link itself, which may be broken
            digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()


def read_folder(root):
    """-> file names, in ImageFolder's order; labels; names of the classes

    Every file in a class folder is an image unless it is hidden or in a hidden folder. A class
    folder may be a link; links to folders inside one, which may lead in circles, are refused.
    """
    _, folders, others = next(os.walk(root, onerror=refuse))
    classes = visible(folders)
    files = []
    labels = []
    for label, name in enumerate(classes):
        members = []
        for folder, below, names in os.walk(os.path.join(root, name), onerror=refuse):
            below[:] = visible(below)  # where os.walk goes next
            for path in [os.path.join(folder, name) for name in below]:
                require(not os.path.islink(path), f"{path}: a link to a folder, expected a folder")
            members += [os.path.join(folder, name) for name in visible(names)]
        files += sorted(members, key=os.path.split)  # by folder, then by name
        labels += [label] * len(members)
    if files and visible(others):
        complain(f"{root}: skipping files outside class folders, e.g. {visible(others)[0]}")
    return files, np.array(labels, dtype=np.int64), classes


def visible(names):
    return sorted(name for name in names if not name.startswith("."))


def refuse(error):  # os.walk would skip a folder that it cannot read
    raise BadInput(f"{error.filename}: cannot be read ({error.strerror})")


def read_npz(path):
    """-> images uint8 (n, H, W, 3), labels int64 (n,), names of the classes"""
    with expecting(path, "arr_0 and labels in an .npz"):
        arrays = dict(np.load(path))
        images = arrays["arr_0"]
        # ADM's sampler saves labels as arr_1, where np.savez(path, *batches) puts more images.
        labels = arrays.get("arr_1", arrays.get("labels")).astype(np.int64, casting="safe")
    require(images.dtype == np.uint8 and images.shape[3:] == (3,),
            f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
    require(labels.shape == images.shape[:1],
            f"{path}: labels or arr_1 are {labels.shape}, expected ({len(images)},)")
    names = arrays.get("classes", np.arange(labels.max(initial=-1) + 1)).astype(str).tolist()
    lowest = labels.min(initial=0)
    highest = labels.max(initial=-1)
    require(lowest >= 0 and highest < len(names),
            f"{path}: labels {lowest} to {highest}, expected 0 to {len(names) - 1}")
    return images, labels, names


# ---- 4. Pictures, and .npz of samples ------------------------------------------------------------

def save_images(path, chunks, labels):
    """Chunks of images, uint8 (b, H, W, 3), and the labels (n,) of them all -> a picture or .npz

    path: .png, one grid, a row per class, in order of first appearance in labels; or .npz with
    arr_0 uint8 (n, H, W, 3), streamed to disk chunk by chunk, and labels int64. Raises BadInput.
    """
    labels = np.asarray(labels).astype(np.int64)
    require(path.endswith((".npz", ".png")), f"{path}: expected a .png or an .npz")
    write = write_npz if path.endswith(".npz") else write_png
    replace_file(path, partial(write, chunks=chunks, labels=labels))


def write_npz(file, chunks, labels):
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            write_array(member, chunks, len(labels))
        with archive.open("labels.npy", "w") as member:
            np.save(member, labels)


def write_png(file, chunks, labels):
    """Images with a white line of one pixel between them, a class a row, small ones enlarged"""
    images = np.concatenate(list(chunks))
    _, height, width, _ = images.shape
    classes = list(dict.fromkeys(labels.tolist()))  # in the order in which they first occur
    columns = np.bincount(labels).max()
    cells = np.full((len(classes), columns, height + 1, width + 1, 3), 255, np.uint8)
    for row, label in enumerate(classes):
        members = images[labels == label]
        cells[row, : len(members), :height, :width] = members
    sheet = rearrange(cells, "row column h w rgb -> (row h) (column w) rgb")[:-1, :-1]
    scale = max(1, 64 // height)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(sheet).save(file, format="PNG")


# ---- 5. Training a small one ---------------------------------------------------------------------

def train(images, out, *, image_size: int = 256, steps: int = 12000, batch: int = 16,
          lr: float = 1e-3, seed: int = 0, codebook_size: int = 256, ch: int = 32,
          ch_mult: tuple = (1, 1, 2), z_channels: int = 32):
    """Train a small tokenizer. OUT, a file, is written at the end.

    The loss is the squared error: LlamaGen's perceptual and adversarial losses need pretrained
    networks. In the first half, codes unused for 100 steps move onto features of the current batch,
    so that the whole codebook is used. Unreadable images are named and left out; the exit code is
    then 2. An OUT that exists is refused.

    ch: channels, a multiple of 32; ch_mult: channels of each level, in multiples of ch; all levels
    but the last halve the image; z_channels: channels before the codebook.
    """
    _, _, device = setup()
    require(codebook_size <= 65536, f"--codebook_size is {codebook_size}, expected at most 65536")
    require(min(image_size, steps, batch) > 0, "--image_size, --steps or --batch is 0")
    torch.manual_seed(seed)
    model = VQModel(codebook_size, 8, ch, ch_mult, z_channels).to(device)
    check_image_size(image_size, model)
    check_output(out)
    require(not os.path.exists(out), f"{out} exists; delete it or choose another file")
    source = Images(images, [image_size])
    items = next(source.read([range(len(source.items))]))
    pixels = np.stack([item[0] for item in items])[source.labels >= 0]
    require(len(pixels) > 0, f"{images}: no readable image")
    embedding = model.quantize["embedding"].weight
    embedding.data.normal_()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))

    used = torch.zeros(codebook_size, device=device)
    error = 0.0
    for step in range(steps):
        # Linear warm-up, then constant, then linear decay over the last 60 %.
        warmup = min(1, (step + 1) / 200)
        decay = min(1, (1 - step / steps) / 0.6)
        optimizer.param_groups[0]["lr"] = lr * warmup * decay

        rng = np.random.default_rng((seed, step))
        chosen = pixels[rng.integers(len(pixels), size=batch)]
        x = from_uint8(chosen).to(device)                             # (B, 3, S, S)
        z = model.features(x)                                         # (B, h, w, D)
        codes = model.nearest(z)                                      # (B, h, w)
        q = model.codebook()[codes]                                   # (B, h, w, D)
        straight_through = z + (q - z).detach()  # the value of q, but the gradient goes to z
        squared_error = F.mse_loss(model.render(straight_through), x)
        # As in VQ-VAE: codes move to the features, and features, more slowly, to their codes.
        codebook_loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        optimizer.zero_grad()
        (squared_error + codebook_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        used += torch.bincount(codes.flatten(), minlength=len(used))
        error += squared_error.item()
        require(math.isfinite(error), f"--lr is {lr}: the loss is {squared_error.item()} at step "
                                      f"{step + 1}; nothing is written, try a lower --lr")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean_error = error / (step % 100 + 1)  # over the steps since the last line
            psnr = 10 * np.log10(4 / mean_error)  # the range from -1 to 1, squared, is 4
            print(f"step {step + 1:,} of {steps:,}  PSNR {psnr:.2f} dB  "
                  f"{int((used > 0).sum())} codes in use", flush=True)
            if step < steps / 2:  # later the features settle, and so must the codes
                unused = (used == 0).nonzero()[:, 0]
                features = z.detach().flatten(0, 2)
                embedding.data[unused] = features[rng.integers(len(features), size=len(unused))]
            used.zero_()
            error = 0.0
    saved = {"model": model.state_dict(), "image_size": image_size}
    replace_file(out, partial(torch.save, saved))
    return 0 if len(pixels) == len(source.items) else 2


def check_image_size(image_size, model):
    """-> image_size or, if that is 0, the tokenizer's own"""
    if image_size == 0:
        image_size = model.image_size
    require(image_size % model.factor == 0,
            f"--image_size is {image_size}, expected a multiple of {model.factor}")
    return image_size


# ---- 6. A data set: the folder that npp.py trains on ---------------------------------------------

SUFFIX = {"train": "", "val": "_val"}  # of the names of a split's files


def check_new(folder, split):
    """Raises BadInput if the split exists, or if a new train split would meet an old val split"""
    names = ["meta.json", "codes_val.npy"] if split == "train" else ["codes_val.npy"]
    for name in names:
        path = f"{folder}/{name}"
        require(not os.path.exists(path), f"{path} exists; delete it or choose another folder")


def check_classes(source, labels, classes):
    """Raises BadInput for a class without images: its samples would be meaningless"""
    images = np.bincount(labels, minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(images == 0)]
    require(not empty, f"{source}: no images of class {', '.join(empty[:9])}")


def publish(folder, split, meta, codes, labels, tokenizer):
    """Write a new split of a data set. Raises BadInput.

    codes: chunks (b, views, h*w); labels: of all chunks together (n,); tokenizer: a file, or None
    """
    end = f"{SUFFIX[split]}.npy"
    replace_file(f"{folder}/labels{end}", partial(np.save, arr=labels.astype(np.uint16)))
    replace_file(f"{folder}/codes{end}", partial(write_array, chunks=codes, n=len(labels)))
    if split == "val":
        return
    if tokenizer:
        with open(tokenizer, "rb") as source:
            replace_file(f"{folder}/tokenizer.pt", partial(shutil.copyfileobj, source))
    text = json.dumps(meta, indent=1).encode()
    replace_file(f"{folder}/meta.json", lambda file: file.write(text))


class Codes:
    """A data set: a folder that `encode` wrote. Raises BadInput.

    codes (images, views, N) and labels (images,) are memory-mapped. The views of an image are the
    crops of it that were encoded; training draws one at random. val is the same pair for the
    validation split, or None. meta is meta.json (vocab, grid, image_size, classes, tokenizer, ...)
    and the number of images; checkpoints of npp.py hold it too. tokenizer: a file to use instead.
    """

    def __init__(self, folder, tokenizer=""):
        path = os.path.join(folder, "meta.json")
        with expecting(path, "the output of tokenizer.py encode"), open(path) as file:
            self.meta = json.load(file)
            if tokenizer:
                self.meta["tokenizer"] = tokenizer
            elif self.meta["tokenizer"]:
                self.meta["tokenizer"] = os.path.join(folder, self.meta["tokenizer"])
        self.codes, self.labels = self.open(folder, "train")
        check_classes(folder, self.labels, self.meta["classes"])
        self.meta["images"] = len(self.codes)
        self.val = None
        if os.path.exists(os.path.join(folder, "codes_val.npy")):
            self.val = self.open(folder, "val")

    def open(self, folder, split):
        """-> its codes (images, views, N) and labels (images,)"""
        arrays = []
        for name in ("codes", "labels"):
            path = os.path.join(folder, f"{name}{SUFFIX[split]}.npy")
            with expecting(path, "an array"):
                arrays.append(np.load(path, mmap_mode="r"))
        codes, labels = arrays
        cells = self.meta["grid"] ** 2
        require(codes.dtype in (np.uint8, np.uint16) and codes.shape[2:] == (cells,),
                f"{codes.filename}: {codes.dtype} {codes.shape}, expected uint8 or uint16 "
                f"(images, views, {cells})")
        require(labels.shape == codes.shape[:1],
                f"{path}: {labels.shape}, expected ({len(codes)},)")
        highest = len(self.meta["classes"]) - 1
        require(labels.min() >= 0 and labels.max() <= highest,
                f"{path}: {labels.min()} to {labels.max()}, expected 0 to {highest}")
        return codes, labels

    def read(self, split, index, view=0):
        """Codes and labels of the images (b,) of a split -> int64 tensors (b, N), (b,)

        split: the pair (codes, labels), or val; view: a number, or one per image (b,).
        """
        all_codes, all_labels = split
        codes = all_codes[index, view]
        require(codes.max() < self.meta["vocab"], f"{all_codes.filename}: code {codes.max()}, "
                                                  f"expected 0 to {self.meta['vocab'] - 1}")
        codes = torch.from_numpy(codes).long()
        labels = torch.from_numpy(all_labels[index]).long()
        if torch.cuda.is_available():  # a copy from pinned memory runs in the background
            return codes.pin_memory(), labels.pin_memory()
        return codes, labels


def class_numbers(text, names, most):
    """Comma-separated names or numbers -> numbers (n,); if empty, `most` classes, evenly spaced"""
    if not text:
        return torch.from_numpy(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))
    known = {str(i): i for i in range(len(names))}
    known.update({name: i for i, name in enumerate(names)})
    wanted = text.split(",")
    require(set(wanted) <= set(known), f"classes is {text}, expected names like {names[0]}, or "
                                       f"numbers from 0 to {len(names) - 1}")
    return torch.tensor([known[name] for name in wanted])


# ---- 7. Images to codes --------------------------------------------------------------------------

def crops(images, size, views):
    """Images (B, 3, S, S) -> list of their views (B, 3, size, size)

    center: the image (S = size) and its mirror image; one: the image alone; ten_crop: corners and
    centre, then the same of the mirror image, in the order of torchvision's TenCrop, as LlamaGen.
    """
    if views == "one":
        return [images]
    both = [images, images.flip(-1)]
    if views == "center":
        return both
    end = images.shape[-1] - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    return [x[..., top : top + size, left : left + size] for x in both for top, left in corners]


def encode(images, out, *, tokenizer: str, image_size: int = 0,
           split: Literal["train", "val"] = "train",
           views: Literal["center", "one", "ten_crop"] = "center", scales: tuple = (1.1,)):
    """Write codes, labels, meta.json and a copy of the tokenizer into OUT, the data set of npp.py

    An existing split is refused. Unreadable images are named and left out; the exit code is then 2.
    If killed, run the same command to continue. Processes started by torchrun share the work.

    image_size: 0 is that of the tokenizer's training, 256 for LlamaGen's. views: center is the crop
    and its mirror image, one the crop alone. scales: sizes that ten_crop cuts from, in multiples of
    image_size; 1.1,1.05 makes 20 views.
    """
    rank, world_size, device = setup()
    check_new(out, split)
    check_output(f"{out}/meta.json")
    model = load_tokenizer(tokenizer, device)
    image_size = check_image_size(image_size, model)
    sizes = [image_size]
    if views == "ten_crop":
        require(split == "train", "--views is ten_crop, expected center or one for val")
        require(min(scales) >= 1, f"--scales is {scales}, expected 1 or more")
        sizes = [int(image_size * scale) for scale in scales]
    source = Images(images, sizes)
    n = len(source.items)
    meta = {"vocab": len(model.codebook()), "grid": image_size // model.factor,
            "image_size": image_size, "classes": source.classes, "tokenizer": "tokenizer.pt",
            "tokenizer_sha256": sha256(tokenizer)}
    if split == "train":
        check_classes(images, source.labels, source.classes)
    else:
        train = Codes(out).meta
        for key in ("image_size", "classes", "tokenizer_sha256"):
            require(train[key] == meta[key], f"{out}: the train split has {key} "
                                             f"{train[key]!s:.99}, val has {meta[key]!s:.99}")

    # Each part of 256 images becomes a file, in a folder named by a hash of flags and images.
    recipe = dict(meta, views=views, sizes=sizes, images=source.fingerprint())
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = f"{out}/codes{SUFFIX[split]}.part"
    chunks = np.split(np.arange(n), range(256, n, 256))
    paths = [f"{folder}/{digest}/{chunk[0]:09}.npz" for chunk in chunks]
    mine = [i for i in range(rank, len(paths), world_size) if not os.path.exists(paths[i])]
    for i, items in zip(mine, source.read([chunks[i] for i in mine])):
        codes = encode_part(items, model, image_size, views)
        labels = source.labels[chunks[i]]
        readable = labels >= 0
        replace_file(paths[i], partial(np.savez, codes=codes[readable], labels=labels[readable]))
        print(f"image {chunks[i][-1] + 1:,} of {n:,}", flush=True)
    if world_size > 1:
        dist.all_reduce(torch.zeros(1))  # waits for all ranks; on the CPU it fails if one has died
    if rank > 0:
        return 0

    # Join the parts.
    labels = np.concatenate([np.load(path)["labels"] for path in paths])
    codes = (np.load(path)["codes"] for path in paths)
    require(len(labels) > 0, f"{images}: no readable image")
    if split == "train":
        check_classes(images, labels, meta["classes"])
    publish(out, split, meta, codes, labels, tokenizer)
    shutil.rmtree(folder)
    print(f"{out}: {len(labels):,} images of {meta['grid']} x {meta['grid']} codes, "
          f"{n - len(labels):,} images unreadable")
    return 0 if len(labels) == n else 2


def encode_part(items, model, image_size, views):
    """b images as from Images.load -> codes (b, views, h*w), uint8 if they fit, else uint16"""
    device = next(model.parameters()).device
    codes = []
    for first in range(0, len(items), 16):  # to fit in memory
        batches = []
        for same_size in zip(*items[first : first + 16]):
            x = from_uint8(np.stack(same_size)).to(device)              # (16, 3, S, S)
            batches += crops(x, image_size, views)
        of_views = [model.encode(batch).flatten(1) for batch in batches]
        codes.append(torch.stack(of_views, dim=1).cpu())                # (16, views, h*w)
    return torch.cat(codes).numpy().astype(np.min_scalar_type(len(model.codebook()) - 1))


# ---- 8. Codes as images --------------------------------------------------------------------------

def show(data, out, *, tokenizer: str = "", split: Literal["train", "val"] = "train"):
    """Decode stored codes: ten images of each of up to ten classes, one class per row of a .png

    tokenizer: its file, if not the one that the data set names.
    """
    _, _, device = setup()
    check_output(out)
    stored = Codes(data, tokenizer)
    pair = (stored.codes, stored.labels) if split == "train" else stored.val
    require(pair, f"{data}: has no codes_val.npy, expected a validation split")
    require(stored.meta["tokenizer"], f"{data}: names no tokenizer, pass --tokenizer")
    model = load_tokenizer(stored.meta["tokenizer"], device, stored.meta)

    names = stored.meta["classes"]
    present = np.unique(pair[1])  # a validation split may lack classes
    classes = present[class_numbers("", present, 10).numpy()]
    chosen = [np.flatnonzero(pair[1] == label)[:10] for label in classes]
    codes, labels = stored.read(pair, np.concatenate(chosen))
    save_images(out, [model.pixels(row.to(device)) for row in codes.split(10)], labels)
    print(f"{out}: row by row {', '.join(names[label] for label in classes)}")
    return 0


def reconstruct(images, out, *, tokenizer: str, image_size: int = 0, margin: int = 0):
    """Images to codes and back, and the PSNR of the reconstructions

    OUT is a .png, rows of images with their reconstructions below, or an .npz of all
    reconstructions. Do not expect a model of these codes to reach a better FID. image_size: 0 is
    that of the tokenizer's training, 256 for LlamaGen's. margin: pixels per side that the PSNR
    leaves out.
    """
    _, _, device = setup()
    is_npz = out.endswith(".npz")
    require(is_npz or out.endswith(".png"), f"{out}: expected a .png or an .npz")
    check_output(out)
    model = load_tokenizer(tokenizer, device)
    image_size = check_image_size(image_size, model)
    require(2 * margin < image_size, f"--margin is {margin}, expected less than half the image")
    inside = slice(margin, image_size - margin)
    source = Images(images, [image_size])
    n = len(source.items)
    rows = []  # of the picture
    errors = []  # of each image

    def reconstructions():
        for items in source.read(np.split(np.arange(n), range(16, n, 16))):
            require(source.labels.min() >= 0, f"{images}: expected readable images only")
            before = np.stack([item[0] for item in items])
            after = to_uint8(model.decode(model.encode(from_uint8(before).to(device))))
            difference = before.astype(float) - after
            errors.extend(np.square(difference[:, inside, inside]).mean(axis=(1, 2, 3)))
            if not rows or (len(rows) < 6 and len(before) >= 10):
                rows.extend([before[:10], after[:10]])
            yield after

    if is_npz:
        save_images(out, reconstructions(), source.labels)
    else:
        for _ in reconstructions():
            pass  # it collects rows and errors
        save_images(out, rows, np.arange(len(rows)).repeat(len(rows[0])))
    psnr = 10 * np.log10(255**2 / np.mean(errors))
    print(f"{out}: PSNR {psnr:.2f} dB, {n:,} images")
    return 0


# ---- 9. Processes, and the command line ----------------------------------------------------------

def setup():
    """-> rank, world_size and device of this process, from torchrun's environment"""
    rank = 0
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:  # RANK alone means nothing: schedulers set it, and shells keep it
        rank = int(os.environ["RANK"])
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        require(processes <= gpus, f"{processes} processes, expected at most one per GPU: {gpus}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # As in LlamaGen's scripts: an A100 encodes ImageNet in hours instead of a day.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return rank, world_size, device


def run_program(main, program):
    """Run main() and exit: 2 after bad input, 130 after Ctrl-C or SIGTERM, with one line each"""
    for stream in (sys.stdout, sys.stderr):  # a terminal may be unable to show a file's name
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    try:
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (BadInput, OSError) as error:
        complain(error, program)
        code = 2
    except KeyboardInterrupt:
        complain("stopped", program)
        code = 130
    except Exception:
        traceback.print_exc()
    if dist.is_initialized():  # its tear-down could wait for ranks that wait for this one
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def complain(error, program="tokenizer.py"):
    """One line on stderr, even if a file's name has line breaks"""
    print(f"{program}: {' '.join(str(error).split())[:1000]}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Raises BadInput where argparse would print its usage and exit"""

    def __init__(self, *names, **options):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(*names, **options, allow_abbrev=False, formatter_class=style)

    def error(self, message):
        raise BadInput(message)


def numbers(text):
    """4,2,1 or 1.1,1.05 -> tuple"""
    return tuple(float(x) if "." in x else int(x) for x in text.split(","))


def parse_flags(program, text, target, argv):
    """Command line -> dict of the arguments it sets for `target`, a function or dataclass

    Arguments with a type are flags: int, float, str, tuple (of numbers), or a Literal of choices.
    Numbers must be at least 0 and below 2^31. --help prints the text. Raises BadInput.
    """
    parser = Parser(program, description=text)
    for name, parameter in inspect.signature(target).parameters.items():
        kind = parameter.annotation
        if kind is parameter.empty:
            parser.add_argument(name)
            continue
        required = parameter.default is parameter.empty
        about = "required" if required else f"default: {parameter.default}"
        if is_dataclass(target):  # its source is in the text
            about = argparse.SUPPRESS
        options = {"required": required, "default": argparse.SUPPRESS, "help": about}
        if get_args(kind):
            parser.add_argument(f"--{name}", choices=get_args(kind), **options)
        else:
            parser.add_argument(f"--{name}", type=numbers if kind is tuple else kind, **options)

    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, (int, float, tuple)):  # NaN is in no range
            require(0 <= np.min(value) and np.max(value) < 2**31,
                    f"--{name} is {value}, expected at least 0 and below 2^31")
    return values


def run_command(program, text, functions, argv):
    """Call the function named by the first word, with flags as its arguments -> what it returns"""
    argv = sys.argv[1:] if argv is None else argv
    commands = {function.__name__: function for function in functions}
    parser = Parser(program, description=text)
    parser.add_argument("command", choices=commands, help="COMMAND --help lists its flags")
    name = parser.parse_args(argv[:1]).command
    run = commands[name]
    return run(**parse_flags(f"{program} {name}", inspect.getdoc(run), run, argv[1:]))


def main(argv=None):
    """-> exit code. Raises BadInput."""
    return run_command("tokenizer.py", __doc__, (train, encode, show, reconstruct), argv)


if __name__ == "__main__":
    run_program(main, "tokenizer.py")
