"""Images to codes and back: the VQGAN of LlamaGen

An encoder shrinks the image by a factor f. Each of the h x w vectors that are left is replaced by
the nearest vector of a codebook, and its number there is the code. A decoder makes an image of
the codes again.

    python tokenizer.py train IMAGES tokenizer.pt --image_size 32     # a small one of one's own
    python tokenizer.py encode IMAGES DATA --tokenizer tokenizer.pt   # codes for npp.py --data DATA
    python tokenizer.py encode IMAGES_VAL DATA --tokenizer tokenizer.pt --split val
    torchrun --nproc_per_node=8 tokenizer.py encode IMAGENET DATA --tokenizer vq_ds16_c2i.pt \\
        --views ten_crop --scales 1.1,1.05                            # as LlamaGen prepares it
    python tokenizer.py show DATA codes.png                           # what stored codes decode to
    python tokenizer.py reconstruct IMAGES out.png --tokenizer tokenizer.pt    # before/after, PSNR
    python tokenizer.py reconstruct IMAGES out.npz --tokenizer tokenizer.pt    # for fid.py

IMAGES is a folder with one sub-folder per class, nested as one likes, or an .npz of `arr_0` uint8
(n, H, W, 3), `labels` (n,) and perhaps `classes`, their names.

Shapes: B images of S x S pixels, h = w = S/f codes a side, D numbers in a vector of the codebook.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing import parent_process
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader, Dataset

# ---- 1. Files


class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""

    def __str__(self):
        return " ".join(super().__str__().splitlines())[:1000]


def load_file(path):
    """torch.load to the CPU of tensors and plain values: a pickle with code in it is refused

    Raises BadInput for whatever else the file may be, a damaged one included.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:  # torch.load does not notice a flipped bit
                if archive.testzip() is not None:
                    raise ValueError("wrong checksum")
        # The official training checkpoints carry their flags as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises many kinds, and some advise to run the code in the file
        raise BadInput(f"{path}: damaged, or more than the tensors and plain values of a "
                       "checkpoint") from None


def replace_file(path, write):
    """write(file) beside `path`, then rename: a crash or a full disk leaves the old file as it was

    Raises BadInput where the file cannot be written.
    """
    part = f"{path}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(part)
        # torch.save answers an OSError, such as that of a full disk, by a RuntimeError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and not isinstance(cause, BrokenPipeError):
            raise BadInput(f"{path}: cannot be written ({cause.strerror})") from None
        raise


def save_json(path, value):
    def write(file):
        file.write(json.dumps(value, indent=1).encode())

    replace_file(path, write)


def load_json(path):
    """-> the dict in a .json file, or None where there is no file. Raises BadInput."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read, expected json ({error})") from None


def remove_if_there(path):
    with suppress(FileNotFoundError):
        os.remove(path)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_uint8(images):
    """Images in [-1, 1] (B, 3, H, W) -> uint8 array (B, H, W, 3), truncated as LlamaGen does"""
    images = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(images, "b c h w -> b h w c").cpu().numpy()


def from_uint8(images):
    """uint8 array (B, H, W, 3) -> float32 tensor in [-1, 1] (B, 3, H, W)"""
    return rearrange(torch.from_numpy(images), "b h w c -> b c h w").float() / 127.5 - 1


# ---- 2. The model, its parts named as in the published vq_ds16_c2i.pt and vq_ds8_c2i.pt


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

    def __init__(self, c_in, c_out, blocks, attention, resample):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.res = nn.ModuleList(ResBlock(widths[i], c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample == "down":
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
        if resample == "up":
            self.upsample = nn.ModuleDict({"conv": conv3x3(c_out, c_out)})

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if self.resample == "down":
            # Padded right and below only, as in the training of the published weights.
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if self.resample == "up":
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def middle(channels):
    blocks = [ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)]
    return nn.ModuleList(blocks)


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> features (B, z_channels, h, w)"""

    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths = [ch] + [ch * multiple for multiple in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = conv3x3(3, ch)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            resample = "down" if i < last else None
            self.conv_blocks.append(Level(widths[i], widths[i + 1], 2, i == last, resample))
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], z_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, 3, S, S): the encoder's levels backwards"""

    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths = [ch * multiple for multiple in reversed(ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = conv3x3(z_channels, widths[0])
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            self.conv_blocks.append(Level(before, width, 3, i == 0, "up" if i < last else None))
        self.norm_out = norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQModel(nn.Module):
    """LlamaGen's image tokenizer. The defaults are VQ-16; ch_mult (1, 2, 2, 4) makes it VQ-8."""

    def __init__(self, codebook_size=16384, codebook_dim=8, ch=128, ch_mult=(1, 1, 2, 2, 4),
                 z_channels=256):
        super().__init__()
        self.factor = 2 ** (len(ch_mult) - 1)  # pixels per code, along each side
        self.encoder = Encoder(ch, ch_mult, z_channels)
        self.decoder = Decoder(ch, ch_mult, z_channels)
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
        similarity = z @ self.codebook().T  # of unit vectors: |z - q|^2 = 2 - 2 z.q
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
        """Codes (B, h, w) -> images (B, 3, S, S), in [-1, 1] up to what to_uint8 clamps"""
        q = rearrange(self.codebook()[codes], "b h w d -> b d h w")
        # Contiguous in memory too: a CPU normalises channels-last less exactly.
        return self.decoder(self.post_quant_conv(q.contiguous()))


def load_tokenizer(path, device="cpu", meta=None):
    """A VQModel in eval mode from a file of ours or LlamaGen's, {"model": state_dict}

    Its sizes are read off the tensors. `meta` may hold what is known of codes at hand, their vocab
    and tokenizer_sha256. Raises BadInput for a tokenizer that did not make them, for weights that
    are not finite, and for any other file.
    """
    saved = load_file(path)
    try:
        state = dict(saved["model"])
        state.pop("quantize.codebook_used", None)  # statistics of LlamaGen's training
        codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
        ch = len(state["encoder.conv_in.bias"])
        z_channels = len(state["encoder.conv_out.bias"])
        ch_mult = []
        while f"encoder.conv_blocks.{len(ch_mult)}.res.0.conv1.bias" in state:
            width = len(state[f"encoder.conv_blocks.{len(ch_mult)}.res.0.conv1.bias"])
            ch_mult.append(width // ch)
        model = VQModel(codebook_size, codebook_dim, ch, ch_mult, z_channels)
        model.load_state_dict(state)
    except Exception as error:  # a foreign file fails in any of these lines, in its own way
        raise BadInput(f"{path}: expected LlamaGen's tokenizer ({error!r})") from None
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity")
    if codebook_size > 65536:
        raise BadInput(f"{path}: {codebook_size} codes, expected at most 65536")
    if meta:
        vocab = meta.get("vocab")
        if vocab not in (None, codebook_size):
            raise BadInput(f"{path}: {codebook_size} codes, expected {vocab}")
        maker = meta.get("tokenizer_sha256")
        if maker and maker != sha256(path):
            raise BadInput(f"{path}: sha256 {sha256(path)}, but another tokenizer made the codes, "
                           f"sha256 {maker}")
    return model.to(device).eval()


# ---- 3. Images


def center_crop(image, size):
    """PIL image -> size x size as ADM prepares ImageNet: halve by a box filter while the short side
    is at least twice the size, bicubic to the size, cut the centre. EXIF rotation is ignored.
    """
    if max(image.size) > 100 * min(image.size):  # resized, it might not fit into memory
        raise ValueError("one side is more than 100 times the other")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image):
    """Any PIL image -> mode RGB

    16-bit gray keeps its high byte, as Pillow does for 16-bit colour (convert would clip). What is
    transparent becomes white: ADM's bare convert("RGB") uncovers whatever colour lies below.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class Images(Dataset):
    """A class folder or an .npz. An item is a list of uint8 (S, S, 3), one for each of the sizes,
    or BadInput that says why the image is unreadable.

    items: file names or arrays; labels: int64 (n,); classes: their names; sha256: of the file
    names, or of the .npz. Raises BadInput.
    """

    def __init__(self, source, sizes):
        self.source = source
        self.sizes = sizes
        self.is_folder = os.path.isdir(source)
        if self.is_folder:
            self.items, self.labels, self.classes = read_folder(source)
            self.sha256 = hashlib.sha256(b"\0".join(self.items.tolist())).hexdigest()
        else:
            self.items, self.labels, self.classes = read_npz(source)
            self.sha256 = sha256(source)
        if len(self.items) == 0:
            raise BadInput(f"{source}: no images, expected one sub-folder per class")
        if len(self.classes) > 65536:
            raise BadInput(f"{source}: {len(self.classes)} classes, expected at most 65536")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name = f"image {i} of {self.source}"
        try:
            if self.is_folder:
                name = os.path.join(self.source, os.fsdecode(self.items[i]))
                with Image.open(name) as image:
                    image = to_rgb(image)
            else:
                image = Image.fromarray(self.items[i])
            return [np.asarray(center_crop(image, size)) for size in self.sizes]
        except Exception as error:  # Pillow raises many kinds; the caller names the file, goes on
            return BadInput(f"{name}: unreadable image ({error!r})")

    def chunks(self, size):
        """Ranges of `size` images each, the last one shorter"""
        return [range(i, min(i + size, len(self))) for i in range(0, len(self), size)]

    def read(self, chunks):
        """Yield the list of the items of each chunk, which worker processes read ahead"""
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(max(1, cores), len(chunks)) if self.is_folder else 0
        yield from DataLoader(self, batch_sampler=chunks, num_workers=workers, collate_fn=list,
                              worker_init_fn=end_with_parent)


def end_with_parent(worker):
    """In a worker process: Ctrl-C is for the parent, whose end is that of the worker too

    Without the thread, the worker of a killed command would wait for ever to hand over an image.
    """

    def wait_for_parent():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Thread(target=wait_for_parent, daemon=True).start()


def stack_readable(items):
    """Items of Images -> uint8 (b, S, S, 3) of each size; BadInput for the first unreadable one"""
    for item in items:
        if isinstance(item, BadInput):
            raise item
    return [np.stack(images) for images in zip(*items)]


def read_folder(path):
    """-> file names below `path`, in ImageFolder's order; labels; names of the classes

    Every file below a class folder counts as an image, except hidden ones (.DS_Store). The names
    are an array of bytes, which worker processes share; each would copy a list little by little.
    """
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    classes = [name for name in names if os.path.isdir(os.path.join(path, name))]
    beside = sorted(set(names) - set(classes))
    if beside:
        complain(BadInput(f"{path}: not in a class folder, left out: {len(beside)} files, the "
                          f"first {beside[0]}"))
    files = []
    labels = []
    for label, name in enumerate(classes):
        members = files_below(os.path.join(path, name), path)
        files.extend(os.fsencode(file) for file in members)
        labels.extend(label for _ in members)
    return np.array(files, dtype=bytes), np.array(labels, dtype=np.int64), classes


def files_below(folder, root):
    """The visible files below a class folder of `root`, as seen from there, in the order of folders

    Links are followed, but no folder is entered twice, and not `root`: links may form a circle.
    """

    def refuse(error):
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    entered = {os.path.realpath(root)}
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(where) in entered:
            folders.clear()  # os.walk goes on to what is left in this list
            continue
        entered.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(where, root)
        visible = sorted(name for name in names if not name.startswith("."))
        found.append((where, [os.path.join(inside, name) for name in visible]))
    files = []
    for _, paths in sorted(found):
        files.extend(paths)
    return files


def read_npz(path):
    """-> images uint8 (n, H, W, 3), labels, names of the classes"""
    try:
        with np.load(path) as arrays:
            images = arrays["arr_0"]
            labels = arrays["labels"]
            names = arrays["classes"] if "classes" in arrays else None
    except Exception as error:  # numpy raises another kind for each way in which a file is broken
        raise BadInput(f"{path}: expected arr_0 and labels in an .npz ({error!r})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise BadInput(f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 "
                       "(n, H, W, 3)")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise BadInput(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers "
                       f"({len(images)},)")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise BadInput(f"{path}: classes are {names.dtype} {names.shape}, expected names (n,)")
    count = 65536 if names is None else len(names)
    wrong = (labels < 0) | (labels >= count)
    if wrong.any():
        i = int(wrong.argmax())
        raise BadInput(f"{path}: the label of image {i} is {labels[i]}, expected 0 to {count - 1}")
    if names is None:
        names = np.arange(labels.max(initial=-1) + 1).astype(str)
    return images, labels.astype(np.int64), names.tolist()


# ---- 4. Pictures, and .npz of samples


def save_grid(path, images, columns, scale=1):
    """One PNG of uint8 images (n, H, W, 3), row by row, with a white line of one pixel between
    them; then every pixel becomes scale x scale
    """
    n, height, width, _ = images.shape
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, height + 1, width + 1, 3), 255, np.uint8)
    cells[:n, :height, :width] = images
    sheet = rearrange(cells, "(row column) h w rgb -> (row h) (column w) rgb", column=columns)
    sheet = sheet[:-1, :-1].repeat(scale, axis=0).repeat(scale, axis=1)
    replace_file(path, partial(Image.fromarray(sheet).save, format="PNG"))


def save_images(path, chunks, labels):
    """Images as a picture or for fid.py

    chunks: uint8 arrays (b, H, W, 3), together as many images as there are labels (n,) integers.
    path: .png, one grid, a class a row in the order in which the labels name them; or .npz with
    arr_0 uint8 (n, H, W, 3), streamed to disk chunk by chunk, and labels int64. Raises BadInput.
    """
    labels = np.asarray(labels).astype(np.int64)
    if path.endswith(".npz"):
        save_npz(path, chunks, labels)
    elif path.endswith(".png"):
        images = np.concatenate(list(chunks))
        classes = list(dict.fromkeys(labels.tolist()))  # in the order in which they first occur
        columns = int(np.bincount(labels).max())
        cells = np.full((len(classes), columns, *images.shape[1:]), 255, np.uint8)
        for row, label in enumerate(classes):
            members = images[labels == label]
            cells[row, : len(members)] = members
        cells = rearrange(cells, "row column h w rgb -> (row column) h w rgb")
        save_grid(path, cells, columns, scale=max(1, 64 // images.shape[1]))
    else:
        raise BadInput(f"{path}: expected a .png or an .npz")


def save_npz(path, chunks, labels):
    """Stream uint8 images (b, H, W, 3) into arr_0 of an .npz; the labels (n,) follow"""

    def write(file):
        written = 0
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for images in chunks:
                    if written == 0:
                        shape = (len(labels), *images.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.tobytes())
                    written += len(images)
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, labels)
        if written != len(labels):
            raise ValueError(f"{written} images, but {len(labels)} labels")

    replace_file(path, write)


# ---- 5. Training a small one


def train(args):
    """Train a small VQModel on squared error: LlamaGen's perceptual and adversarial losses need
    pretrained networks. Codes not used for 100 steps move onto features of the current batch, so
    that the whole codebook is put to work.

    Every 100 steps all is kept in OUT.train, from which the same command goes on. OUT itself is
    written at the end.
    """
    check_range("steps", args.steps, 1, 10**9)
    check_range("batch", args.batch, 1, 65536)
    check_range("lr", args.lr, 0, 1e9)
    check_range("seed", args.seed, 0, 2**63 - 1)
    check_range("codebook_size", args.codebook_size, 1, 65536)
    check_range("ch", args.ch, 32, 1024)
    check_range("z_channels", args.z_channels, 1, 4096)
    if args.ch % 32 != 0:
        raise BadInput(f"--ch is {args.ch}, expected a multiple of 32")
    for multiple in args.ch_mult:
        check_range("ch_mult", multiple, 1, 16)
    _, _, device = setup()
    torch.manual_seed(args.seed)
    model = VQModel(args.codebook_size, 8, args.ch, args.ch_mult, args.z_channels).to(device)
    check_image_size(args.image_size, model)
    data = Images(args.images, [args.image_size])
    [images] = stack_readable([data[i] for i in range(len(data))])
    embedding = model.quantize["embedding"].weight
    embedding.data.normal_()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))

    # Go on where the same command was stopped.
    checkpoint = f"{args.out}.train"
    recipe = dict(vars(args), images_sha256=data.sha256)
    for name in ("run", "command", "images", "out"):
        del recipe[name]
    first = 0
    if os.path.exists(checkpoint):
        saved = load_file(checkpoint)
        refuse_another(checkpoint, saved.get("recipe"), recipe, "training")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    used = torch.zeros(args.codebook_size, device=device)
    error = 0.0
    for step in range(first, args.steps):
        # Linear warm-up, then constant, then linear decay over the last 60 %.
        warmup = min(1, (step + 1) / 200)
        decay = min(1, (1 - step / args.steps) / 0.6)
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay

        rng = np.random.default_rng((args.seed, step))
        batch = images[rng.integers(len(images), size=args.batch)]
        x = from_uint8(batch).to(device)                              # (B, 3, S, S)
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
        if not math.isfinite(error):
            remove_if_there(checkpoint)
            raise BadInput(f"--lr is {args.lr}: the loss is {squared_error.item()} at step "
                           f"{step + 1}, expected a number; {args.out} is not written")
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            mean_error = error / (step % 100 + 1)
            psnr = 10 * np.log10(4 / mean_error)  # the range from -1 to 1, squared, is 4
            print(f"step {step + 1:,} of {args.steps:,}  PSNR {psnr:.2f} dB  "
                  f"{int((used > 0).sum())} codes in use", flush=True)
            if step < args.steps / 2:  # later the features settle, and so must the codes
                unused = (used == 0).nonzero()[:, 0]
                features = z.detach().flatten(0, 2)
                embedding.data[unused] = features[rng.integers(len(features), size=len(unused))]
            used.zero_()
            error = 0.0
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "step": step + 1, "recipe": recipe}
            replace_file(checkpoint, partial(torch.save, saved))
    save_tokenizer(args.out, model)
    os.remove(checkpoint)
    return 0


def save_tokenizer(path, model):
    """Write {"model": state_dict}, in float16: half the bytes to ship. Raises BadInput."""
    state = {}
    for name, weight in model.state_dict().items():
        state[name] = weight.half()
        if not state[name].isfinite().all():
            raise BadInput(f"{path}: not written, as {name} holds what is no number in float16")
    replace_file(path, partial(torch.save, {"model": state}))


def check_range(name, value, low, high):
    if not low <= value <= high:  # NaN is in no range
        raise BadInput(f"--{name} is {value}, expected {low} to {high}")


def check_image_size(image_size, model):
    check_range("image_size", image_size, 1, 1024)
    if image_size % model.factor != 0:
        raise BadInput(f"--image_size is {image_size}, expected a multiple of {model.factor}")


# ---- 6. A data set: the folder that npp.py trains on

# What the train split and the validation split of a data set have in common.
SHARED = ("vocab", "grid", "image_size", "classes", "tokenizer_sha256")
SUFFIX = {"train": "", "val": "_val"}  # of the names of their files


def differences(there, here, keys):
    """Those of `keys` in which two dicts differ, as text; empty if in none"""
    found = []
    for key in keys:
        if there.get(key) != here.get(key):
            old = str(there.get(key))[:99]
            new = str(here.get(key))[:99]
            found.append(f"{key} is {old} there, {new} here")
    return "; ".join(found)


def refuse_another(path, there, here, what):
    """Raise BadInput unless the work under way at `path` is the same as what is asked for here"""
    if there != here:
        raise BadInput(f"{path}: another {what} is under way, {differences(there, here, here)}; "
                       "expected the same, or that you delete it")


def publish(folder, split, meta, codes, shape, labels, tokenizer):
    """Put a split into a data set, in place of another that may be there

    codes: arrays (b, views, h*w), together of `shape`; labels: (n,); tokenizer: a file, or None.

    All that is new is written beside what is there, so that a full disk changes nothing. Then
    follow renames alone. What vouches for the split, meta.json for train and codes_val.npy for
    val, goes before the first of them and comes back by the last: whoever is killed in between
    leaves no data set, or one without validation, but never a mix.
    """

    def save_codes(file):
        dtype = np.min_scalar_type(meta["vocab"] - 1)
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in codes:
            file.write(part.astype(dtype).tobytes())

    suffix = SUFFIX[split]
    names = [f"labels{suffix}.npy", f"codes{suffix}.npy"]
    new = f"{folder}/new{suffix}.part"
    try:
        replace_file(f"{new}/codes{suffix}.npy", save_codes)
        replace_file(f"{new}/labels{suffix}.npy", partial(np.save, arr=labels.astype(np.uint16)))
        if split == "train" and tokenizer:
            names.append("tokenizer.pt")
            with open(tokenizer, "rb") as source:
                replace_file(f"{new}/tokenizer.pt", partial(shutil.copyfileobj, source))
        if split == "train":
            names.append("meta.json")
            save_json(f"{new}/meta.json", meta)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise

    outdated = [names[-1]]
    if split == "train":
        old_meta = load_json(f"{folder}/meta.json")
        if old_meta is None or differences(old_meta, meta, SHARED):
            outdated += ["codes_val.npy", "labels_val.npy"]  # of other codes
    for name in outdated:
        remove_if_there(f"{folder}/{name}")
    for name in names:
        os.replace(f"{new}/{name}", f"{folder}/{name}")
    shutil.rmtree(new)


# ---- 7. Images to codes

VIEWS = {"center": 2, "one": 1, "ten_crop": 10}


def crops(images, size, views):
    """Images (B, 3, S, S) -> list of their views (B, 3, size, size)

    center: the image (S = size) and its mirror image; one: the first alone; ten_crop: corners and
    centre, then those of the mirror image, in the order of torchvision's TenCrop, as LlamaGen.
    """
    if views == "one":
        return [images]
    mirrored = images.flip(-1)
    if views == "center":
        return [images, mirrored]
    end = images.shape[-1] - size
    middle = round(end / 2)
    found = []
    for whole in (images, mirrored):
        for top, left in [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]:
            found.append(whole[..., top : top + size, left : left + size])
    return found


def encode(args):
    """Write codes, labels, meta.json and a copy of the tokenizer into the folder OUT

    Unreadable images are named and left out; then the exit code is 2. Each chunk of images becomes
    a file in OUT/codes.part, so that the same command goes on after a kill. The ranks take chunks
    in turn; a chunk is the same with any number of them, and so are the codes. An .npz is held in
    memory, of a folder only the names.
    """
    rank, world_size, device = setup()
    if args.split == "val" and args.views == "ten_crop":
        raise BadInput("--views is ten_crop, expected center or one for --split val")
    sizes = [args.image_size]
    if args.views == "ten_crop":
        for scale in args.scales:
            check_range("scales", scale, 1, 4)
        sizes = [int(args.image_size * scale) for scale in args.scales]
    model = load_tokenizer(args.tokenizer, device)
    check_image_size(args.image_size, model)
    data = Images(args.images, sizes)

    grid = args.image_size // model.factor
    meta = {"vocab": len(model.codebook()), "grid": grid, "image_size": args.image_size,
            "classes": data.classes, "tokenizer": "tokenizer.pt",
            "tokenizer_sha256": sha256(args.tokenizer), "made_by": "tokenizer.py encode"}
    if args.split == "val":
        check_against_train(args.out, meta)
    plan = dict(meta, views=args.views, scales=args.scales, images_sha256=data.sha256)
    folder = f"{args.out}/codes{SUFFIX[args.split]}.part"
    start_parts(folder, plan, rank)
    wait_for_ranks()

    chunks = data.chunks(64)
    write_parts(folder, chunks[rank::world_size], data, model, args)
    wait_for_ranks()
    if rank > 0:
        return 0

    # Join the parts.
    readable = np.concatenate([read_part(folder, chunk, "readable") for chunk in chunks])
    unreadable = np.count_nonzero(~readable)
    if unreadable == len(data):
        remove_parts(folder)
        raise BadInput(f"{args.images}: not one readable image")
    labels = data.labels[readable]
    used = np.zeros(meta["vocab"], bool)

    def codes():
        for chunk in chunks:
            part = read_part(folder, chunk, "codes")
            used[part] = True
            yield part

    shape = (len(labels), len(sizes) * VIEWS[args.views], grid**2)
    publish(args.out, args.split, meta, codes(), shape, labels, args.tokenizer)
    remove_parts(folder)
    print(f"{args.out}: {len(labels):,} images, {shape[1]} views of {grid} x {grid} codes, "
          f"{used.sum()} of {len(used)} in use, {unreadable:,} images unreadable")
    return 2 if unreadable else 0


def check_against_train(folder, meta):
    """Raise BadInput unless the codes of a validation split are like those of the train split"""
    path = f"{folder}/meta.json"
    train = load_json(path)
    if train is None:
        raise BadInput(f"{path}: missing, expected the train split to be encoded first")
    names = train.get("classes", [])
    unnamed = [str(i) for i in range(len(meta["classes"]))]
    if names == unnamed or (meta["classes"] == unnamed and len(names) >= len(unnamed)):
        meta = dict(meta, classes=names)  # one of the two splits came without names
    differ = differences(train, meta, SHARED)
    if differ:
        raise BadInput(f"{path}: the train split has other codes: {differ}")


def start_parts(folder, plan, rank):
    """Make the folder of parts, or go on with the one that is there; plan: what decides the codes

    Raises BadInput where it is of another plan.
    """
    found = load_json(f"{folder}/plan.json")
    if found is not None:
        refuse_another(folder, found, plan, "encoding")
    elif rank == 0:
        remove_parts(folder)
        save_json(f"{folder}/plan.json", plan)


def remove_parts(folder):
    remove_if_there(f"{folder}/plan.json")  # first: without it the parts do not count
    shutil.rmtree(folder, ignore_errors=True)


def part_path(folder, chunk):
    return f"{folder}/{chunk.start:09}.npz"


def read_part(folder, chunk, name):
    """The array `name` of a part: codes (of the readable images, views, h*w) or readable (b,)"""
    path = part_path(folder, chunk)
    try:
        with np.load(path) as arrays:
            return arrays[name]
    except Exception as error:  # numpy raises another kind for each way in which a file is broken
        raise BadInput(f"{path}: damaged, delete it and encode again ({error!r})") from None


def write_parts(folder, chunks, data, model, args):
    """Encode those of the chunks that have no part yet, or one in which an image was unreadable"""
    to_do = []
    for chunk in chunks:
        exists = os.path.exists(part_path(folder, chunk))
        if not exists or not read_part(folder, chunk, "readable").all():
            to_do.append(chunk)
    start = time.time()
    for done, (chunk, items) in enumerate(zip(to_do, data.read(to_do))):
        readable = np.array([not isinstance(item, BadInput) for item in items])
        good = []
        for item in items:
            if isinstance(item, BadInput):
                complain(item)
            else:
                good.append(item)
        codes = np.zeros(0, np.uint8)
        if good:
            codes = encode_chunk(model, stack_readable(good), args.image_size, args.views)
        part = partial(np.savez, codes=codes, readable=readable)
        replace_file(part_path(folder, chunk), part)
        if not dist.is_initialized() or dist.get_rank() == 0:
            show_progress(done + 1, len(to_do), start)


@torch.no_grad()
def encode_chunk(model, images, size, views):
    """uint8 images (b, S, S, 3) at each scale -> codes (b, views, h*w) uint8 or uint16"""
    device = next(model.parameters()).device
    codes = []
    for scaled in images:
        for view in crops(from_uint8(scaled).to(device), size, views):
            pieces = [model.encode(piece) for piece in view.split(16)]  # to fit into memory
            codes.append(torch.cat(pieces).flatten(1))
    codes = torch.stack(codes, dim=1).cpu().numpy()
    return codes.astype(np.min_scalar_type(len(model.codebook()) - 1))


def show_progress(done, total, start):
    """How much of the work is done and the time left, on one line of a terminal"""
    seconds = (time.time() - start) / done * (total - done)
    left = timedelta(seconds=round(seconds))
    print(f"{done:,} of {total:,}, {left} left ", end="\r", flush=True)


# ---- 8. A data set, and its codes as images


def read_meta(folder):
    """meta.json of a folder of codes -> dict, the tokenizer's path made whole. Raises BadInput."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path) as f:
            meta = json.load(f)
        for name in ("vocab", "grid", "image_size"):
            if type(meta[name]) is not int or meta[name] < 1:
                raise ValueError(f"{name} is {meta[name]}, expected a whole number of 1 or more")
        names = meta["classes"]
        if type(names) is not list or not names or not all(type(x) is str for x in names):
            raise ValueError("classes is no list of names")
        if meta["tokenizer"]:
            meta["tokenizer"] = os.path.join(folder, meta["tokenizer"])
        meta["tokenizer_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: expected what tokenizer.py encode writes ({error!r})") from None
    return meta


def open_codes(folder, meta, suffix=""):
    """Memory-map one split -> codes (images, views, h*w), labels (images,). Raises BadInput."""
    arrays = []
    for name in ("codes", "labels"):
        path = os.path.join(folder, f"{name}{suffix}.npy")
        try:
            arrays.append(np.load(path, mmap_mode="r"))
        except Exception as error:  # numpy raises many kinds, one for each kind of damage
            raise BadInput(f"{path}: missing or damaged, expected an array ({error!r})") from None
    codes, labels = arrays
    cells = meta["grid"] ** 2
    if codes.dtype not in (np.uint8, np.uint16) or codes.shape[2:] != (cells,) or not codes.size:
        raise BadInput(f"{codes.filename}: {codes.dtype} {codes.shape}, expected uint8 or uint16 "
                       f"(images, views, {cells})")
    if labels.dtype.kind not in "iu" or labels.shape != codes.shape[:1]:
        raise BadInput(f"{path}: {labels.dtype} {labels.shape}, expected integers ({len(codes)},)")
    if labels.min() < 0 or labels.max() >= len(meta["classes"]):
        raise BadInput(f"{path}: {labels.min()} to {labels.max()}, expected 0 to "
                       f"{len(meta['classes']) - 1}")
    return codes, labels


def show(args):
    """Decode stored codes: ten images each of up to ten classes, spread evenly, a class a row"""
    _, _, device = setup()
    meta = read_meta(args.data)
    codes, labels = open_codes(args.data, meta, SUFFIX[args.split])
    path = args.tokenizer or meta["tokenizer"]
    if path is None:
        raise BadInput(f"{args.data}: names no tokenizer, expected --tokenizer")
    model = load_tokenizer(path, device, meta)

    classes = np.unique(labels)
    spread = np.linspace(0, len(classes) - 1, min(10, len(classes))).astype(int)
    chosen = [np.flatnonzero(labels == label)[:10] for label in classes[spread]]
    images = []
    for rows in chosen:
        some = torch.from_numpy(codes[rows, 0].astype(np.int64))
        if some.max() >= meta["vocab"]:
            raise BadInput(f"{codes.filename}: {some.max()}, expected codes from 0 to "
                           f"{meta['vocab'] - 1}")
        some = rearrange(some, "b (h w) -> b h w", h=meta["grid"]).to(device)
        images.append(to_uint8(model.decode(some)))
    save_images(args.out, images, labels[np.concatenate(chosen)])
    names = [meta["classes"][label] for label in classes[spread]]
    print(f"{args.out}: row by row {', '.join(names)}")
    return 0


def reconstruct(args):
    """Print the PSNR of what the codes keep of images; write, as .png, rows of images with that
    below each, or, as .npz, that of all images: the FID to beat for a model on these codes
    """
    _, _, device = setup()
    if not args.out.endswith((".png", ".npz")):
        raise BadInput(f"{args.out}: expected a .png or an .npz")
    model = load_tokenizer(args.tokenizer, device)
    check_image_size(args.image_size, model)
    check_range("margin", args.margin, 0, (args.image_size - 1) // 2)
    inside = slice(args.margin, args.image_size - args.margin)
    data = Images(args.images, [args.image_size])
    rows = []  # for the picture
    errors = []

    def reconstructions():
        for items in data.read(data.chunks(16)):
            [images] = stack_readable(items)
            again = to_uint8(model.decode(model.encode(from_uint8(images).to(device))))
            difference = images.astype(float) - again
            errors.append(np.square(difference[:, inside, inside]).sum())
            if not rows or (len(rows) < 6 and len(images) >= 10):
                rows.append(images[:10])
                rows.append(again[:10])
            yield again

    if args.out.endswith(".npz"):
        save_images(args.out, reconstructions(), data.labels)
    else:
        for _ in reconstructions():
            pass  # it collects rows and errors
        save_grid(args.out, np.concatenate(rows), len(rows[0]), max(1, 64 // args.image_size))
    pixels = len(data) * 3 * (args.image_size - 2 * args.margin) ** 2
    psnr = math.inf
    if sum(errors) > 0:
        psnr = 10 * np.log10(255**2 * pixels / sum(errors))
    print(f"{args.out}: PSNR {psnr:.2f} dB, {len(data):,} images")
    return 0


# ---- 9. Processes, and the command line


def setup():
    """-> this process's rank, the number of ranks (torchrun sets both), and its device"""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"process {local_rank} here has no GPU, expected one process for each "
                           f"of {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        # TF32 rounds: the codes made on a GPU would differ from those made on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if world_size > 1 and not dist.is_initialized():
        # A day: ranks wait for the slowest, and a rank that ends is noticed at once anyway.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return rank, world_size, device


def wait_for_ranks():
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            raise BadInput("another rank ended before the work was done") from None


def complain(error):
    print(f"tokenizer.py: {error}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Errors of one line, where argparse prints the usage too"""

    def error(self, message):
        raise BadInput(message)


def integers(text):
    return tuple(int(x) for x in text.split(","))


def numbers(text):
    return [float(x) for x in text.split(",")]


def parse(argv):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     help="COMMAND --help lists its flags")

    def add_command(run, arguments, text):
        command = commands.add_parser(run.__name__, help=text, description=text,
                                      allow_abbrev=False,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for name in arguments.split():
            command.add_argument(name)
        return command.add_argument

    add = add_command(train, "images out", "train a small tokenizer")
    add("--image_size", type=int, default=256, help="pixels a side")
    add("--steps", type=int, default=12000, help="steps")
    add("--batch", type=int, default=16, help="images a step")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--codebook_size", type=int, default=256, help="codes")
    add("--ch", type=int, default=32, help="channels, a multiple of 32")
    add("--ch_mult", type=integers, default=(1, 1, 2), metavar="1,2,..",
        help="channels of each level, in multiples of ch")
    add("--z_channels", type=int, default=32, help="channels beside the codebook")

    add = add_command(encode, "images out", "images to codes, the data set of npp.py")
    add("--tokenizer", required=True, help="the tokenizer's file")
    add("--image_size", type=int, default=256, help="pixels a side")
    add("--split", choices=["train", "val"], default="train", help="which split of the data set")
    add("--views", choices=list(VIEWS), default="center",
        help="center (with the mirror image), one (without) or ten_crop; for --split val center "
             "or one, as view 0 is validated on")
    add("--scales", type=numbers, default=[1.1], metavar="1.1,..",
        help="what ten_crop cuts from, in multiples of image_size; 1.1,1.05 gives 20 views")

    add = add_command(show, "data out", "decode the stored codes of a data set into a picture")
    add("--tokenizer", help="the tokenizer's file, where the data set holds none")
    add("--split", choices=["train", "val"], default="train", help="which split of the data set")

    add = add_command(reconstruct, "images out", "images to codes and back into a .png or an .npz")
    add("--tokenizer", required=True, help="the tokenizer's file")
    add("--image_size", type=int, default=256, help="pixels a side")
    add("--margin", type=int, default=0, help="pixels along each side that the PSNR leaves out")
    return parser.parse_args(argv)


def main(argv=None):
    """-> exit code"""
    try:
        args = parse(argv)
        if args.command != "encode" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise BadInput(f"{args.command} runs in one process, torchrun started several")
        return args.run(args)
    except BadInput as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, stop)
    sys.exit(main())
