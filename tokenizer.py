"""Images to codes and back: the VQGAN of LlamaGen

An encoder shrinks the image by f = 2^(levels - 1), each of the h x w vectors that are left is
replaced by the nearest of a few codes, and a decoder turns codes back into an image.

    python tokenizer.py train IMAGES tokenizer.pt --image_size 32     # a small one of one's own
    python tokenizer.py encode IMAGES DATA --tokenizer tokenizer.pt   # codes for npp.py --data DATA
    python tokenizer.py encode IMAGES_VAL DATA --tokenizer tokenizer.pt --split val
    torchrun --nproc_per_node=8 tokenizer.py encode IMAGENET DATA --tokenizer vq_ds16_c2i.pt \\
        --views ten_crop --scales 1.1,1.05                            # as LlamaGen prepares it
    python tokenizer.py pack LLAMAGEN_CODES DATA                      # adopt what LlamaGen encoded
    python tokenizer.py reconstruct IMAGES out.png --tokenizer tokenizer.pt    # before/after, PSNR
    python tokenizer.py reconstruct IMAGES out.npz --tokenizer tokenizer.pt    # for fid.py

IMAGES is a folder with one sub-folder per class, nested as one likes, or an .npz of `arr_0` uint8
(n, H, W, 3), `labels` (n,) and perhaps `classes`, their names.

Shapes: B images, S pixels a side, h = w = S/f codes a side, C codes in the book, D width of one.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from multiprocessing import parent_process
from threading import Thread

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common import (BadInput, Machine, Parser, brief, check_ranges, from_uint8, generator,
                    load_file, one_line_errors, progress, save_grid, save_npz, sha256, to_uint8,
                    write_atomically)

# ---- 1. Model, its parts named as in the published vq_ds16_c2i.pt and vq_ds8_c2i.pt -------------

def norm(c):
    return nn.GroupNorm(32, c, eps=1e-6)

def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)

class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W)"""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv3(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))

class AttnBlock(nn.Module):
    """One head, every position sees every other: (B, c, H, W) -> (B, c, H, W)"""
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))

class Level(nn.Module):
    """Residual blocks at one resolution, attention behind each if asked, then maybe a resampling"""
    def __init__(self, c_in, c_out, blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c, c_out) for c in [c_in] + [c_out] * (blocks - 1))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks * attention))
        if resample == "down":
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
        elif resample == "up":
            self.upsample = nn.ModuleDict({"conv": conv3(c_out, c_out)})

    def forward(self, x):
        for res, attn in zip_longest(self.res, self.attn, fillvalue=nn.Identity()):
            x = attn(res(x))
        if hasattr(self, "downsample"):  # padded right and below only, as the checkpoints were
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        elif hasattr(self, "upsample"):
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x

def middle(c):
    return nn.ModuleList([ResBlock(c, c), AttnBlock(c), ResBlock(c, c)])

class Encoder(nn.Module):
    """Images (B, 3, S, S) -> features (B, z_channels, h, w)"""
    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths, last = [ch, *(ch * m for m in ch_mult)], len(ch_mult) - 1
        self.conv_in = conv3(3, ch)
        self.conv_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], 2, i == last, "down" if i < last else None)
            for i in range(last + 1))
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), conv3(widths[-1], z_channels)

    def forward(self, x):
        x = nn.Sequential(self.conv_in, *self.conv_blocks, *self.mid)(x)
        return self.conv_out(F.silu(self.norm_out(x)))

class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, 3, S, S)"""
    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths, last = [ch * m for m in (*ch_mult, ch_mult[-1])][::-1], len(ch_mult) - 1
        self.conv_in = conv3(z_channels, widths[0])
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], 3, i == 0, "up" if i < last else None)
            for i in range(last + 1))
        self.norm_out, self.conv_out = norm(widths[-1]), conv3(widths[-1], 3)

    def forward(self, z):
        x = nn.Sequential(self.conv_in, *self.mid, *self.conv_blocks)(z)
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
        """The codes as unit vectors (C, D): only their direction counts"""
        return F.normalize(self.quantize["embedding"].weight, dim=-1)

    def features(self, images):
        """Images (B, 3, S, S) -> unit vectors (B, h, w, D)"""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(rearrange(z, "b d h w -> b h w d"), dim=-1)

    def nearest(self, z):
        """Unit vectors (..., D) -> indices of the nearest codes (...)"""
        return (z @ self.codebook().T).argmax(-1)  # |z - q|^2 = 2 - 2 z.q for unit vectors

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
        q = q.contiguous()  # in memory too: a CPU normalises channels-last less exactly
        return self.decoder(self.post_quant_conv(q))

def load_tokenizer(path, device="cpu", facts=None):
    """A VQModel in eval mode from a file of ours or LlamaGen's, {"model": state_dict}

    Its sizes are read off the tensors. `facts` are what is known of codes at hand: their vocab and
    tokenizer_sha256. Raises BadInput for a tokenizer that did not make them, or any other file."""
    saved = load_file(path)
    try:
        state = {k: v for k, v in saved["model"].items() if k != "quantize.codebook_used"}
        ch, z_channels = (len(state[f"encoder.{k}.bias"]) for k in ("conv_in", "conv_out"))
        levels = 1 + max(int(k.split(".")[2]) for k in state if "encoder.conv_blocks" in k)
        widths = [len(state[f"encoder.conv_blocks.{i}.res.0.conv1.bias"]) for i in range(levels)]
        codebook = state["quantize.embedding.weight"].shape
        model = VQModel(*codebook, ch, [c // ch for c in widths], z_channels)
        model.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: expected LlamaGen's tokenizer ({brief(error)})") from None
    if facts and facts["vocab"] != codebook[0]:
        raise BadInput(f"{path}: {codebook[0]} codes, expected {facts['vocab']}")
    if facts and facts["tokenizer_sha256"] not in (None, found := sha256(path)):
        raise BadInput(f"{path}: sha256 {found}, but another tokenizer made the codes, sha256 "
                       f"{facts['tokenizer_sha256']}")
    return model.to(device).eval()

# ---- 2. Images ---------------------------------------------------------------------------------

def center_crop(image, size):
    """PIL image -> size x size as ADM prepares ImageNet: halve by a box filter while the short side
    is at least twice the size, bicubic to the size, cut the centre. EXIF rotation is ignored."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def to_rgb(image):
    """Any PIL image -> mode RGB. 16-bit gray keeps its high byte, as Pillow does for 16-bit colour
    (convert would clip). What is transparent becomes white: ADM's bare convert("RGB") uncovers
    whatever colour happens to lie below."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")

class Images(Dataset):
    """A class folder or an .npz. An item is a list of uint8 (S, S, 3), one for each of the sizes,
    or a str saying why it is unreadable.

    items: file names (as bytes: an array that worker processes share) or arrays; labels: int64
    (n,); classes: their names; sha256: of the images' names, or of the .npz. Raises BadInput."""
    def __init__(self, source, *sizes):
        self.source, self.sizes, self.folder = source, sizes, os.path.isdir(source)
        read = read_folder if self.folder else read_npz
        self.items, self.labels, self.classes = read(source)
        if not len(self.items):
            raise BadInput(f"{source}: no images, expected one sub-folder per class")
        self.sha256 = (hashlib.sha256(b"\0".join(self.items.tolist())).hexdigest() if self.folder
                       else sha256(source))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name = f"image {i} of {self.source}"
        try:
            if self.folder:
                name = os.path.join(self.source, os.fsdecode(self.items[i]))
            with Image.open(name) if self.folder else Image.fromarray(self.items[i]) as image:
                image = to_rgb(image)
            return [np.asarray(center_crop(image, size)) for size in self.sizes]
        except Exception as error:  # PIL raises many kinds; the caller names the file and goes on
            return f"{name}: unreadable image ({brief(error)})"

    def batches(self, chunks):
        """Lists of the items of each chunk (a range) in turn, read in worker processes"""
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
        workers = min(max(1, cores), len(chunks)) if self.folder else 0
        return DataLoader(self, batch_sampler=chunks, num_workers=workers, collate_fn=list,
                          worker_init_fn=end_with_parent)

def end_with_parent(_):
    """In a worker: else that of a killed command waits for ever to hand over what it has read"""
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()

def chunks_of(n, size):
    return [range(i, min(i + size, n)) for i in range(0, n, size)]

def read_folder(path):
    """-> file names below `path` as bytes, in ImageFolder's order; labels; names of the classes

    Every file below a class folder counts as an image, except hidden ones (.DS_Store)."""
    entries = sorted((e for e in os.scandir(path) if e.name[0] != "."), key=lambda e: e.name)
    classes = [e.name for e in entries if e.is_dir()]
    if beside := [e.name for e in entries if not e.is_dir()]:
        print(f"tokenizer.py: {path}: not in a class folder, left out: {len(beside)} files, the "
              f"first {beside[0]}", file=sys.stderr)
    files, labels = [], []
    for label, name in enumerate(classes):
        for where, _, names in sorted(os.walk(os.path.join(path, name), followlinks=True)):
            where, names = os.path.relpath(where, path), sorted(x for x in names if x[0] != ".")
            files += [os.fsencode(os.path.join(where, x)) for x in names]
            labels += [label] * len(names)
    return np.array(files, dtype=bytes), np.array(labels), classes

def read_npz(path):
    try:
        with np.load(path) as z:
            images, labels = z["arr_0"], z["labels"].astype(np.int64)
            names = z["classes"].tolist() if "classes" in z else None
    except Exception as error:  # numpy has another one for each way in which a file is broken
        raise BadInput(f"{path}: expected arr_0 and labels in an .npz ({brief(error)})") from None
    if not labels.size:
        raise BadInput(f"{path}: no images")
    classes = names or [str(i) for i in range(labels.max() + 1)]
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
        raise BadInput(f"{path}: arr_0 is {images.dtype} {images.shape} and labels {labels.shape}, "
                       "expected uint8 (n, H, W, 3) and (n,)")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise BadInput(f"{path}: label {labels.max()}, but {len(classes)} class names")
    return images, labels, classes

# ---- 3. Training a small one ---------------------------------------------------------------------

def train(args):
    """Train a small VQModel on squared error: LlamaGen's perceptual and adversarial losses need
    pretrained networks. Codes not used for 100 steps move onto features of the current batch, so
    that the whole book is put to work."""
    torch.manual_seed(args.seed)
    device = Machine().device
    model = VQModel(args.codebook_size, 8, args.ch, args.ch_mult, args.z_channels).to(device)
    fits(args.image_size, model)
    data = Images(args.images, args.image_size)
    (images,) = readable([data[i] for i in range(len(data))])
    book = model.quantize["embedding"].weight
    book.data.normal_()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    used, error = torch.zeros(len(book), device=device), 0.0
    for step in range(args.steps):
        rng, left = generator(args.seed, step), (1 - step / args.steps) / 0.6
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 200) * min(1, left)
        x = from_uint8(images[rng.integers(len(images), size=args.batch)]).to(device)
        z = model.features(x)
        q = model.codebook()[model.nearest(z)]
        squared = F.mse_loss(model.render(z + (q - z).detach()), x)  # gradient skips the argmax
        commitment = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)  # as in VQ-VAE
        optimizer.zero_grad()
        (squared + commitment).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        error += squared.item()
        used += torch.bincount(model.nearest(z).flatten(), minlength=len(book))
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            db = 10 * np.log10(4 * (step % 100 + 1) / error)  # the range from -1 to 1 squared is 4
            print(f"step {step + 1:,} of {args.steps:,}  PSNR {db:.2f} dB  "
                  f"{int((used > 0).sum())} codes in use", flush=True)
            if step < args.steps / 2:  # later the features settle, and so must the codes
                dead, z = (used < 1).nonzero()[:, 0], z.detach().flatten(0, 2)
                book.data[dead] = z[rng.integers(len(z), size=len(dead))]
            used, error = torch.zeros_like(used), 0.0
            save_tokenizer(args.out, model)
    return 0

def save_tokenizer(path, model):
    """Write {"model": state_dict}, in float16: half the bytes to ship"""
    state = {k: v.half() for k, v in model.state_dict().items()}
    write_atomically(path, lambda f: torch.save({"model": state}, f))

def readable(items):
    """Items of Images -> uint8 (n, S, S, 3) of each size; BadInput for the first unreadable one"""
    for item in items:
        if isinstance(item, str):
            raise BadInput(item)
    return [np.stack(images) for images in zip(*items)]

def fits(image_size, model):
    if image_size <= 0 or image_size % model.factor:
        raise BadInput(f"image_size is {image_size}, expected a multiple of {model.factor}")

# ---- 4. A finished data set: the folder that npp.py trains on ------------------------------------

FACTS = ("vocab", "grid", "image_size", "classes", "tokenizer_sha256")  # that both splits share

def read_json(path):
    """-> the dict that a .json file holds, {} if there is no file. Raises BadInput."""
    try:
        with open(path) as f:
            return dict(json.load(f))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: damaged, expected json ({brief(error)})") from None

def as_json(value):
    return json.dumps(value, indent=1).encode()

def differences(there, here, keys):
    pairs = [(k, str(there.get(k))[:99], str(here.get(k))[:99]) for k in keys
             if there.get(k) != here.get(k)]
    return "; ".join(f"{k} is {a} there, {b} here" for k, a, b in pairs)

def publish(out, suffix, meta, rows, views, labels, tokenizer):
    """Write a split's codes, from parts `rows` (b, views, h*w), labels and perhaps tokenizer

    What vouches for the other files, meta.json or, for val, the codes, goes before they change and
    comes back last: a kill leaves no mix to train on. A val split of other codes goes too."""
    def path(name):
        return os.path.join(out, name)

    def save_codes(f):
        dtype = np.min_scalar_type(meta["vocab"] - 1)
        shape = len(labels), views, meta["grid"] ** 2
        header = dict(descr=dtype.str, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(f, header)
        for part in rows:
            f.write(part.astype(dtype).tobytes())

    write_atomically(path(f"codes{suffix}.new"), save_codes)
    stale = differences(read_json(path("meta.json")), meta, FACTS)
    val = ["codes_val.npy", "labels_val.npy"] * bool(suffix or stale)
    for name in val + ["meta.json"] * (not suffix):
        with suppress(FileNotFoundError):
            os.remove(path(name))
    write_atomically(path(f"labels{suffix}.npy"), lambda f: np.save(f, labels.astype(np.uint16)))
    copy = path("tokenizer.pt")
    if tokenizer and not (os.path.exists(copy) and sha256(copy) == meta["tokenizer_sha256"]):
        with open(tokenizer, "rb") as f:
            write_atomically(copy, lambda to: shutil.copyfileobj(f, to))
    os.replace(path(f"codes{suffix}.new"), path(f"codes{suffix}.npy"))
    if not suffix:
        write_atomically(path("meta.json"), lambda f: f.write(as_json(meta)))

# ---- 5. Images to codes --------------------------------------------------------------------------

VIEWS = {"center": 2, "one": 1, "ten_crop": 10}

def crops(images, size, views):
    """Images (B, 3, S, S) -> list of their views (B, 3, size, size)

    center: the image (S = size) and its mirror image; one: the first alone; ten_crop: corners and
    centre, then those of the mirror image, in the order of torchvision's TenCrop, as LlamaGen."""
    if views != "ten_crop":
        return [images, images.flip(-1)][: VIEWS[views]]
    far, mid = images.shape[-1] - size, round((images.shape[-1] - size) / 2)
    corners = (0, 0), (0, far), (far, 0), (far, far), (mid, mid)
    return [x[..., top : top + size, left : left + size]
            for x in (images, images.flip(-1)) for top, left in corners]

class Work:
    """The folder of an encoding under way, which ranks fill in any order and a kill cannot harm

    plan.json: what decides the result; codes: of all images; status: a byte for each, 0 to do, 1
    done, 2 unreadable, written when its codes are on the disk. Neither is mapped: resident memory
    would grow with them, and machines that share the folder undo each other's pages."""
    def __init__(self, path, plan, n, views):
        self.path, self.plan, self.n = path, plan, n
        self.shape, self.dtype = (views, plan["grid"] ** 2), np.min_scalar_type(plan["vocab"] - 1)
        self.row = math.prod(self.shape) * self.dtype.itemsize            # bytes of an image

    def file(self, name):
        return os.path.join(self.path, name)

    def create(self):
        shutil.rmtree(self.path, ignore_errors=True)
        os.makedirs(self.path)
        for name, size in (("codes", self.n * self.row), ("status", self.n)):
            with open(self.file(name), "wb") as f:
                f.truncate(size)                                          # zeros
        write_atomically(self.file("plan.json"), lambda f: f.write(as_json(self.plan)))  # counts

    def status(self):
        return np.fromfile(self.file("status"), np.uint8)

    def write(self, first, codes, status):
        """Codes (b, views, h*w) and status (b,) of the images from `first` on"""
        for name, start, array in ("codes", first * self.row, codes), ("status", first, status):
            with open(self.file(name), "r+b") as f:
                f.seek(start)
                f.write(array.tobytes())
                f.flush()
                os.fsync(f.fileno())

    def rows(self, used):
        """The codes of all readable images in parts, of which `used` (vocab,) takes note"""
        good = self.status() == 1
        with open(self.file("codes"), "rb") as f:
            for chunk in chunks_of(self.n, 4096):
                codes = np.fromfile(f, self.dtype, len(chunk) * math.prod(self.shape))
                codes = codes.reshape(-1, *self.shape)
                codes = codes[good[chunk.start : chunk.stop]]
                used[codes] = True
                yield codes

    def remove(self):
        os.remove(self.file("plan.json"))  # first: without it, what a kill leaves does not count
        shutil.rmtree(self.path)

def encode(args):
    """Write codes, labels, meta.json and a copy of the tokenizer into the folder args.out

    Unreadable images are named and left out; then the exit code is 2. The work is done in
    args.out/codes.part, so that the same command goes on after a kill, and tries again what was
    unreadable. Ranks share out chunks of images that are always the same, so that their number
    changes no bit. An .npz is held in memory, of a folder only the names."""
    scales = [float(x) for x in args.scales.split(",")] if args.views == "ten_crop" else [1]
    data, model, machine = open_both(args, *(int(args.image_size * s) for s in scales))
    suffix, views = "" if args.split == "train" else "_val", len(scales) * VIEWS[args.views]
    path = os.path.join(args.out, f"codes{suffix}.part")
    found = read_json(os.path.join(path, "plan.json"))
    meta = {"vocab": len(model.codebook()), "grid": args.image_size // model.factor,
            "image_size": args.image_size, "classes": data.classes, "tokenizer": "tokenizer.pt",
            "tokenizer_sha256": sha256(args.tokenizer), "made_by": "tokenizer.py encode"}
    if suffix:
        meta = of_train(args.out, meta)
    plan = {**meta, "views": args.views, "scales": scales, "files_sha256": data.sha256}
    if found and found != plan:
        raise BadInput(f"{path}: another encoding is under way, {differences(found, plan, plan)}; "
                       "expected the same, or that you delete it")
    work = Work(path, plan, len(data), views)
    machine.wait()  # all ranks have looked before one writes
    if machine.rank == 0 and not found:
        work.create()
    machine.wait()
    bad = torch.tensor(float(fill(work, data, model, machine, args)))
    bad = round(machine.mean(bad).item() * machine.world)                 # of all ranks
    if machine.rank:
        return 0
    if bad == len(data):
        work.remove()
        raise BadInput(f"{args.images}: not one readable image")
    labels, used = data.labels[work.status() == 1], np.zeros(meta["vocab"], bool)
    publish(args.out, suffix, meta, work.rows(used), views, labels, args.tokenizer)
    work.remove()
    print(f"{args.out}: {len(labels):,} images, {views} views of {meta['grid']} x {meta['grid']} "
          f"codes, {used.sum()} of {len(used)} in use" + f", {bad:,} unreadable" * (bad > 0))
    return 2 if bad else 0

def of_train(out, meta):
    """The meta.json of the train split, with which a val split must agree. Raises BadInput."""
    path = os.path.join(out, "meta.json")
    if not (train := read_json(path)):
        raise BadInput(f"{path}: missing, expected the train split to be encoded first")
    if train.get("classes") == [str(i) for i in range(len(meta["classes"]))]:  # packed: no names
        meta = {**meta, "classes": train["classes"]}
    if differ := differences(train, meta, FACTS):
        raise BadInput(f"{path}: the train split has other codes: {differ}")
    return train

def fill(work, data, model, machine, args):
    """Encode this rank's chunks that are not done yet -> how many images are unreadable"""
    status, began, bad = work.status(), time.time(), 0
    machine.wait()  # all ranks have read it before one writes
    before = np.count_nonzero(status)
    chunks = [c for c in chunks_of(len(data), 64) if (status[c.start : c.stop] != 1).any()]
    chunks = chunks[machine.rank :: machine.world]
    for chunk, items in zip(chunks, data.batches(chunks)):
        good = np.array([not isinstance(x, str) for x in items])
        codes = np.zeros((len(items), *work.shape), work.dtype)
        for message in (x for x in items if isinstance(x, str)):
            print(f"\ntokenizer.py: {message}", file=sys.stderr, flush=True)
        if good.any():
            images = readable([x for x in items if not isinstance(x, str)])
            views = [view for x in images for view in crops(
                from_uint8(x).to(machine.device), args.image_size, args.views)]
            views = [[model.encode(x) for x in v.split(16)] for v in views]  # to fit memory
            views = torch.stack([torch.cat(v).flatten(1) for v in views], dim=1)
            codes[good] = views.cpu().numpy()                             # (b, views, h*w)
        work.write(chunk.start, codes, np.where(good, 1, 2).astype(np.uint8))
        bad += np.count_nonzero(~good)
        if machine.rank == 0:
            progress(np.count_nonzero(work.status()), before, len(data), began)
    return bad

def open_both(args, *sizes):
    """-> images prepared at these sizes, tokenizer, machine"""
    data, machine = Images(args.images, *sizes), Machine()
    model = load_tokenizer(args.tokenizer, machine.device)
    fits(args.image_size, model)
    return data, model, machine

# ---- 6. The codes that LlamaGen extracted --------------------------------------------------------

def pack(args):
    """Adopt {images}/imagenet{SIZE}_codes/{i}.npy (1, views, N) and .._labels/{i}.npy (1,)

    A folder ..ten_crop is followed by the views of ..ten_crop_105 beside it, where there is one.
    Raises BadInput for the first file that is missing or wrong."""
    source = os.path.abspath(args.images)
    names = [x for x in sorted(os.listdir(source)) if re.fullmatch(r"[a-z]+\d+_codes", x)]
    if len(names) != 1:
        raise BadInput(f"{source}: {names}, expected one folder like imagenet256_codes")
    size, vocab, digest = int(re.findall(r"\d+", names[0])[0]), 16384, None
    folders = [source] + [f"{source}_105"] * (source.endswith("ten_crop")
                                              and os.path.isdir(f"{source}_105"))
    folders = [os.path.join(folder, names[0]) for folder in folders]
    shape = load_item(f"{folders[0]}/0.npy").shape
    grid = math.isqrt(shape[-1]) if shape else 0
    if args.tokenizer:
        model, digest = load_tokenizer(args.tokenizer), sha256(args.tokenizer)
        vocab, grid = len(model.codebook()), size // model.factor
    labels = [np.concatenate(list(numbered(f"{folder.removesuffix('codes')}labels", (1,), 65536)))
              for folder in folders]
    if not all(np.array_equal(x, labels[0]) for x in labels):
        raise BadInput(f"{folders[1]}: other labels, expected those beside {folders[0]}")
    views = len(folders) * shape[1] if len(shape) == 3 else 1
    parts = zip(*(numbered(f, (1, views // len(folders), grid**2), vocab, len(labels[0]))
                  for f in folders))
    rows = (np.concatenate(part, axis=2)[:, 0] for part in parts)
    meta = {"vocab": vocab, "grid": grid, "image_size": size,
            "classes": [str(i) for i in range(labels[0].max() + 1)],
            "tokenizer": "tokenizer.pt" if digest else None, "tokenizer_sha256": digest,
            "made_by": "tokenizer.py pack"}
    publish(args.out, "", meta, rows, views, labels[0][:, 0], args.tokenizer)
    print(f"{args.out}: {len(labels[0]):,} images of {len(meta['classes'])} classes, "
          f"{views} views of {grid} x {grid} codes")
    return 0

def numbered(folder, shape, limit, expected=None):
    """The arrays folder/{0, 1, ..}.npy of one shape, in stacks; BadInput names one that is not"""
    names, began = set(os.listdir(folder)), time.time()
    n = expected or sum(name[:-4].isdigit() for name in names)
    if wrong := sorted({f"{i}.npy" for i in range(n)} ^ names, key=lambda x: (len(x), x)):
        raise BadInput(f"{folder}/{wrong[0]}: missing or too many, expected 0.npy to {n - 1}.npy")

    def load(i):
        x = load_item(path := f"{folder}/{i}.npy")
        if x.shape != shape or x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= limit:
            raise BadInput(f"{path}: {x.dtype} {x.shape}, expected integers {shape} from 0 to "
                           f"{limit - 1}")
        return x

    with ThreadPoolExecutor(16) as pool:  # small files are waited for
        for chunk in chunks_of(n, 1024):
            yield np.stack(list(pool.map(load, chunk)))
            progress(chunk.stop, 0, n, began)

def load_item(path):
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: missing or damaged, expected an array ({brief(error)})") from None

# ---- 7. How much the codes keep, and the command line --------------------------------------------

def reconstruct(args):
    """Print the PSNR of what the codes keep of images; write, as .png, rows of images with that
    below each, or, as .npz, that of all images: the FID to beat for a model on these codes"""
    if not args.out.endswith((".png", ".npz")):
        raise BadInput(f"{args.out}: expected a .png or an .npz")
    data, model, machine = open_both(args, args.image_size)
    rows, error, count = [], 0.0, 0
    inside = np.s_[:, args.margin : args.image_size - args.margin,
                   args.margin : args.image_size - args.margin]

    def reconstructions():
        nonlocal error, count
        for items in data.batches(chunks_of(len(data), 16)):
            (images,) = readable(items)
            again = to_uint8(model.decode(model.encode(from_uint8(images).to(machine.device))))
            error += np.square(images[inside].astype(float) - again[inside]).sum()
            count += images[inside].size
            if not rows or len(rows) < 6 and len(images) >= 10:
                rows.extend([images[:10], again[:10]])
            yield again

    if args.out.endswith(".npz"):
        shape = len(data), args.image_size, args.image_size, 3
        save_npz(args.out, reconstructions(), shape, data.labels)
    else:
        for _ in reconstructions():
            pass
        scale = max(1, 64 // args.image_size)
        save_grid(args.out, np.concatenate(rows), len(rows[0]), scale=scale)
    psnr = 10 * np.log10(255**2 * count / error) if error else math.inf
    print(f"{args.out}: PSNR {psnr:.2f} dB, {len(data):,} images")
    return 0

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    commands = {"train": train, "encode": encode, "pack": pack, "reconstruct": reconstruct}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("images", help="folder of class folders, or .npz; pack: LlamaGen's codes")
    parser.add_argument("out", help="train: tokenizer.pt; encode, pack: folder; reconstruct: .png "
                                    "or .npz")
    for flag, default, text in (
        ("tokenizer", "", "encode, reconstruct, if known pack: the tokenizer's file"),
        ("image_size", 256, "pixels a side"),
        ("split", "train", "encode: train or val"),
        ("views", "center", "encode: center (with the mirror image), one (without) or ten_crop; "
                            "for --split val center or one, as view 0 is validated on"),
        ("scales", "1.1", "encode: what ten_crop cuts from, in image_size; 1.1,1.05: 20 views"),
        ("margin", 0, "reconstruct: pixels along each side that the PSNR leaves out"),
        ("steps", 12000, "train: steps"),
        ("batch", 16, "train: images a step"),
        ("lr", 1e-3, "train: learning rate"),
        ("seed", 0, "train: of weights and batches"),
        ("codebook_size", 256, "train: codes"),
        ("ch", 32, "train: channels, a multiple of 32"),
        ("ch_mult", (1, 1, 2), "train: channels of each level, in multiples of ch"),
        ("z_channels", 32, "train: channels beside the codebook"),
    ):
        parser.add_flag(flag, default, text)
    args = parser.parse_args(argv)
    check_ranges(args, {
        "1 or more": "image_size steps batch codebook_size z_channels", "train, val": "split",
        "0 or more": "lr seed margin", "center, one, ten_crop": "views"})
    for name, right, expected in (
        ("command", args.command == "encode" or os.environ.get("WORLD_SIZE", "1") == "1",
         "encode where torchrun starts several processes"),
        ("tokenizer", args.tokenizer or args.command in ("train", "pack"), "the tokenizer's file"),
        ("split", args.split == "train" or args.command == "encode", "train, except for encode"),
        ("views", args.views != "ten_crop" or args.split == "train", "center or one for val"),
        ("scales", re.fullmatch(r"[1-9]\d*(\.\d+)?(,[1-9]\d*(\.\d+)?)*", args.scales),
         "numbers of 1 or more, with commas"),
        ("margin", 2 * args.margin < args.image_size, "less than half of image_size"),
        ("ch", args.ch in range(32, 1025, 32), "a multiple of 32"),
        ("ch_mult", min(args.ch_mult) > 0, "1 or more each"),
    ):
        if not right:
            raise BadInput(f"{name} is {getattr(args, name)}, expected {expected}")
    return commands[args.command](args)

if __name__ == "__main__":
    sys.exit(main())
