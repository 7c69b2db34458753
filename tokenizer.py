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
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

# ---- 1. Files


class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""


def require(condition, message):
    if not condition:
        raise BadInput(message)


def load_file(path):
    """-> the dict of tensors and plain values in a .pt file, on the CPU. Else raises BadInput."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:  # torch.load does not notice a flipped bit
            with zipfile.ZipFile(path) as archive:
                require(archive.testzip() is None, "wrong checksum")
        # The official training checkpoints carry their flags as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises many kinds, and some advise to run the code in the file
        raise BadInput(f"{path}: damaged, or more than tensors and plain values") from None
    require(isinstance(saved, dict), f"{path}: holds a {type(saved).__name__}, expected a dict")
    return saved


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


def load_json(path):
    """-> the dict in a .json file. Raises BadInput."""
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: expected what tokenizer.py encode writes ({error!r})") from None


def write_json(file, value):
    file.write(json.dumps(value, indent=1).encode())


def write_array(file, chunks, n):
    """Stream arrays (b, ..), together n rows, into one .npy"""
    for i, chunk in enumerate(chunks):
        if i == 0:
            shape = (n, *chunk.shape[1:])
            header = {"descr": chunk.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(chunk.tobytes())


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

    def __init__(self, c_in, c_out, blocks, attention=False, down=False, up=False):
        super().__init__()
        self.res = nn.ModuleList([ResBlock(c_in, c_out)])
        for _ in range(blocks - 1):
            self.res.append(ResBlock(c_out, c_out))
        self.attn = nn.ModuleList()
        if attention:
            self.attn.extend(AttnBlock(c_out) for _ in range(blocks))
        self.downsample = nn.Sequential()
        if down:  # padded right and below only, as in the training of the published weights
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
    parts = nn.Sequential()  # it runs what is assigned to it in the order of assignment
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

    Its sizes are read off the tensors. meta: that of codes at hand; if it has vocab or
    tokenizer_sha256, they must be those of this tokenizer. Raises BadInput.
    """
    saved = load_file(path)
    try:
        state = saved["model"].copy()
        state.pop("quantize.codebook_used", None)  # statistics of LlamaGen's training
        codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
        ch = len(state["encoder.conv_in.bias"])
        z_channels = len(state["encoder.conv_out.bias"])
        biases = [f"encoder.conv_blocks.{level}.res.0.conv1.bias" for level in range(9)]
        ch_mult = [len(state[name]) // ch for name in biases if name in state]  # of up to 9 levels
        model = VQModel(codebook_size, codebook_dim, ch, ch_mult, z_channels)
        model.load_state_dict(state)
    except Exception as error:  # a foreign file fails in any of these lines, in its own way
        raise BadInput(f"{path}: expected LlamaGen's tokenizer ({error!r})") from None
    for name, weight in model.named_parameters():
        require(weight.isfinite().all(), f"{path}: {name} holds NaN or infinity")
    require(codebook_size <= 65536, f"{path}: {codebook_size} codes, expected at most 65536")
    if meta:
        vocab = meta.get("vocab")
        require(vocab in (None, codebook_size), f"{path}: {codebook_size} codes, expected {vocab}")
        digest = meta.get("tokenizer_sha256")
        require(digest in (None, sha256(path)), f"{path}: sha256 {sha256(path)}, but another "
                                                f"tokenizer made the codes, sha256 {digest}")
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


class Images:
    """A class folder or an .npz. An item is a list of uint8 (S, S, 3), one for each of the sizes.

    items: file names or arrays; labels: int64 (n,); classes: their names; sha256: of the file
    names, or of the .npz. Raises BadInput, for an unreadable image where its item is asked for.
    """

    def __init__(self, source, sizes):
        self.source = source
        self.sizes = sizes
        if os.path.isdir(source):
            self.items, self.labels, self.classes = read_folder(source)
            self.sha256 = hashlib.sha256(os.fsencode("\0".join(self.items))).hexdigest()
        else:
            self.items, self.labels, self.classes = read_npz(source)
            self.sha256 = sha256(source)
        require(len(self.items) > 0, f"{source}: no images, expected one sub-folder per class")
        require(len(self.classes) <= 65536, f"{source}: more than 65536 classes")

    def __getitem__(self, i):
        item = self.items[i]
        name = f"image {i} of {self.source}"
        try:
            if isinstance(item, str):
                name = os.path.join(self.source, item)
                with Image.open(name) as file:
                    image = to_rgb(file)
            else:
                image = Image.fromarray(item)
            return [np.asarray(center_crop(image, size)) for size in self.sizes]
        except Exception as error:  # Pillow raises many kinds
            raise BadInput(f"{name}: unreadable image ({error!r})") from None

    def chunks(self, size):
        """Indices of the images, `size` together -> list of int64 arrays"""
        n = len(self.items)
        return np.split(np.arange(n), np.arange(size, n, size))

    def read(self, chunks):
        """Yield the items of each chunk as futures, while threads read the two that follow"""
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        ahead = []
        # No `with`: it waits for the threads wherever this generator ends. If the caller stops
        # early, the garbage collector ends it, perhaps in a thread that is just starting, and the
        # two wait for each other. Without it the threads end when the pool is freed.
        pool = ThreadPoolExecutor(max(1, cores))
        for chunk in chunks:
            ahead.append([pool.submit(self.__getitem__, i) for i in chunk])
            if len(ahead) > 2:
                yield ahead.pop(0)
        yield from ahead


def read_folder(root):
    """-> file names below `root`, in ImageFolder's order; labels; names of the classes

    Every file below a class folder counts as an image, except hidden ones (.DS_Store).
    """
    files = []
    labels = []
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
        classes = [name for name in names if os.path.isdir(os.path.join(root, name))]
        for label, name in enumerate(classes):
            members = files_below(root, name, [os.path.realpath(root)])
            files += sorted(members, key=os.path.split)  # by folder, then by name
            labels += [label] * len(members)
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror})") from None
    if len(names) > len(classes):
        complain(f"{root}: files that are in no class folder are left out, such as "
                 f"{min(set(names) - set(classes))}")
    return files, np.array(labels, dtype=np.int64), classes


def files_below(root, folder, above):
    """-> the files below root/folder. Links are followed, but not to one of the folders `above`."""
    here = os.path.realpath(os.path.join(root, folder))
    if here in above:
        return []
    files = []
    for entry in os.scandir(os.path.join(root, folder)):
        name = os.path.join(folder, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            files += files_below(root, name, above + [here])
        else:
            files.append(name)
    return files


def read_npz(path):
    """-> images uint8 (n, H, W, 3), labels, names of the classes"""
    try:
        with np.load(path) as arrays:
            images = arrays["arr_0"]
            labels = arrays["labels"]
            names = arrays.get("classes")
    except Exception as error:  # numpy raises another kind for each way in which a file is broken
        raise BadInput(f"{path}: expected arr_0 and labels in an .npz ({error!r})") from None
    require(images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3,
            f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
    require(labels.dtype.kind in "iu" and labels.shape == images.shape[:1],
            f"{path}: labels are {labels.dtype} {labels.shape}, expected integers "
            f"({len(images)},)")
    highest = 65535
    if names is not None:
        require(names.dtype.kind == "U" and names.ndim == 1,
                f"{path}: classes are {names.dtype} {names.shape}, expected names (n,)")
        highest = len(names) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > highest))
    if len(wrong):
        raise BadInput(f"{path}: the label of image {wrong[0]} is {labels[wrong[0]]}, expected 0 "
                       f"to {highest}")
    labels = labels.astype(np.int64)
    if names is None:
        names = np.arange(labels.max(initial=-1) + 1).astype(str)
    return images, labels, names.tolist()


# ---- 4. Pictures, and .npz of samples


def save_images(path, chunks, labels):
    """Images as a picture or for fid.py

    chunks: uint8 arrays (b, H, W, 3), together as many images as there are labels (n,) integers.
    path: .png, one grid, a class a row in the order in which the labels name them; or .npz with
    arr_0 uint8 (n, H, W, 3), streamed to disk chunk by chunk, and labels int64. Raises BadInput.
    """
    labels = np.asarray(labels).astype(np.int64)
    if path.endswith(".npz"):
        replace_file(path, partial(write_npz, chunks=chunks, labels=labels))
    elif path.endswith(".png"):
        replace_file(path, partial(write_png, chunks=chunks, labels=labels))
    else:
        raise BadInput(f"{path}: expected a .png or an .npz")


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


# ---- 5. Training a small one


def train(args):
    """Train a small tokenizer. OUT is written at the end.

    The loss is the squared error: LlamaGen's perceptual and adversarial losses need pretrained
    networks. Codes not used for 100 steps move onto features of the current batch, so that the
    whole codebook is put to work.
    """
    _, _, device = setup()
    require(args.ch % 32 == 0, f"--ch is {args.ch}, expected a multiple of 32")
    torch.manual_seed(args.seed)
    model = VQModel(args.codebook_size, 8, args.ch, args.ch_mult, args.z_channels).to(device)
    check_image_size(args.image_size, model)
    data = Images(args.images, [args.image_size])
    images = np.stack([data[i][0] for i in range(len(data.items))])
    embedding = model.quantize["embedding"].weight
    embedding.data.normal_()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))

    used = torch.zeros(args.codebook_size, device=device)
    error = 0.0
    for step in range(args.steps):
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
        require(math.isfinite(error), f"--lr is {args.lr}: the loss is {squared_error.item()} at "
                                      f"step {step + 1}, expected a number; nothing is written")
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            mean_error = error / (step % 100 + 1)  # over the steps since the last line
            psnr = 10 * np.log10(4 / mean_error)  # the range from -1 to 1, squared, is 4
            print(f"step {step + 1:,} of {args.steps:,}  PSNR {psnr:.2f} dB  "
                  f"{int((used > 0).sum())} codes in use", flush=True)
            if step < args.steps / 2:  # later the features settle, and so must the codes
                unused = (used == 0).nonzero()[:, 0]
                features = z.detach().flatten(0, 2)
                embedding.data[unused] = features[rng.integers(len(features), size=len(unused))]
            used.zero_()
            error = 0.0
    save_tokenizer(args.out, model)
    return 0


def save_tokenizer(path, model):
    """Write {"model": state_dict}, in float16: half the bytes to ship. Raises BadInput."""
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    for name, weight in state.items():
        require(weight.isfinite().all(), f"{path}: not written, {name} is too large for float16")
    replace_file(path, partial(torch.save, {"model": state}))


def check_image_size(image_size, model):
    require(image_size % model.factor == 0,
            f"--image_size is {image_size}, expected a multiple of {model.factor}")


# ---- 6. A data set: the folder that npp.py trains on

# What the train split and the validation split of a data set have in common.
SHARED = ("vocab", "grid", "image_size", "classes", "tokenizer_sha256")
SUFFIX = {"train": "", "val": "_val"}  # of the names of their files


def require_same(path, ours, keys, reason):
    """Raise BadInput unless the .json at `path` holds the same as `ours` under each of the keys"""
    theirs = load_json(path)
    for key in keys:
        require(theirs.get(key) == ours[key],
                f"{path}: {reason}: {key} is {theirs.get(key)!s:.99} there, {ours[key]!s:.99} here")


def publish(folder, split, meta, codes, labels, tokenizer):
    """Put a split into a data set, in place of another that may be there

    codes: arrays (b, views, h*w); labels: as many (n,); tokenizer: a file, or None.

    All that is new is written beside what is there, so that a full disk changes nothing. Then
    follow renames alone. What vouches for the split, meta.json for train and codes_val.npy for
    val, goes before the first of them and comes back by the last: whoever is killed in between
    leaves no data set, or one without validation, but never a mix.
    """
    suffix = SUFFIX[split]
    new = f"{folder}/new{suffix}.part"
    names = [f"labels{suffix}.npy", f"codes{suffix}.npy"]
    outdated = []
    try:
        replace_file(f"{new}/{names[0]}", partial(np.save, arr=labels.astype(np.uint16)))
        replace_file(f"{new}/{names[1]}", partial(write_array, chunks=codes, n=len(labels)))
        if split == "train":
            if tokenizer:
                names.append("tokenizer.pt")
                with open(tokenizer, "rb") as source:
                    replace_file(f"{new}/tokenizer.pt", partial(shutil.copyfileobj, source))
            names.append("meta.json")
            replace_file(f"{new}/meta.json", partial(write_json, value=meta))
            try:
                require_same(f"{folder}/meta.json", meta, SHARED, "other codes")
            except BadInput:
                outdated = ["codes_val.npy", "labels_val.npy"]

        for name in [names[-1]] + outdated:
            with suppress(FileNotFoundError):
                os.remove(f"{folder}/{name}")
        for name in names:
            os.replace(f"{new}/{name}", f"{folder}/{name}")
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_meta(folder):
    """meta.json of a folder of codes -> dict, the tokenizer's path made whole. Raises BadInput."""
    path = os.path.join(folder, "meta.json")
    meta = load_json(path)
    for name in ("vocab", "grid", "image_size"):
        value = meta.get(name)
        require(type(value) is int and value > 0,
                f"{path}: {name} is {value}, expected a whole number of 1 or more")
    names = meta.get("classes")
    require(isinstance(names, list) and names and all(isinstance(x, str) for x in names),
            f"{path}: classes are {names!s:.99}, expected a list of names")
    for name in ("tokenizer", "tokenizer_sha256"):
        require(name in meta, f"{path}: {name} is missing, expected at least null")
    if meta["tokenizer"]:
        meta["tokenizer"] = os.path.join(folder, str(meta["tokenizer"]))
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
    require(codes.dtype in (np.uint8, np.uint16) and codes.shape[2:] == (cells,) and codes.size,
            f"{codes.filename}: {codes.dtype} {codes.shape}, expected uint8 or uint16 "
            f"(images, views, {cells})")
    require(labels.dtype.kind in "iu" and labels.shape == codes.shape[:1],
            f"{path}: {labels.dtype} {labels.shape}, expected integers ({len(codes)},)")
    highest = len(meta["classes"]) - 1
    require(labels.min() >= 0 and labels.max() <= highest,
            f"{path}: {labels.min()} to {labels.max()}, expected 0 to {highest}")
    return codes, labels


# ---- 7. Images to codes


def crops(images, size, views):
    """Images (B, 3, S, S) -> list of their views (B, 3, size, size)

    center: the image (S = size) and its mirror image; one: the first alone; ten_crop: corners and
    centre, then those of the mirror image, in the order of torchvision's TenCrop, as LlamaGen.
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


def encode(args):
    """Write codes, labels, meta.json and a copy of the tokenizer into OUT, the data set of npp.py

    Unreadable images are named and left out; then the exit code is 2. The same command goes on
    after a kill: each chunk of images becomes a file in OUT/codes.part. Several processes, started
    by torchrun, share the work and write the same codes as one.
    """
    rank, world_size, device = setup()
    sizes = [args.image_size]
    if args.views == "ten_crop":
        require(args.split == "train",
                "--views is ten_crop, expected center or one for --split val")
        sizes = [int(args.image_size * scale) for scale in args.scales]
    model = load_tokenizer(args.tokenizer, device)
    check_image_size(args.image_size, model)
    data = Images(args.images, sizes)
    meta = {"vocab": len(model.codebook()), "grid": args.image_size // model.factor,
            "image_size": args.image_size, "classes": data.classes, "tokenizer": "tokenizer.pt",
            "tokenizer_sha256": sha256(args.tokenizer), "made_by": "tokenizer.py encode"}
    if args.split == "val":
        # A split whose images came without names of classes has classes named 0, 1, 2, ..
        names = read_meta(args.out)["classes"]
        unnamed = [str(i) for i in range(len(data.classes))]
        if names == unnamed or (data.classes == unnamed and len(unnamed) <= len(names)):
            meta["classes"] = names
        require_same(f"{args.out}/meta.json", meta, SHARED, "the train split has other codes")

    # Make the folder of parts, or go on with the one that is there.
    folder = f"{args.out}/codes{SUFFIX[args.split]}.part"
    plan_path = f"{folder}/plan.json"
    plan = {"views": args.views, "scales": args.scales, "images_sha256": data.sha256}
    plan.update(meta)
    if os.path.exists(plan_path):
        require_same(plan_path, plan, plan, "another encoding is under way, finish or delete it")
    elif rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        replace_file(plan_path, partial(write_json, value=plan))
    wait_for_ranks()

    # The ranks take parts in turn. Where an image was unreadable, it may be whole by now.
    parts = {f"{folder}/{chunk[0]:09}.npz": chunk for chunk in data.chunks(64)}
    to_do = []
    for path in list(parts)[rank::world_size]:
        if not os.path.exists(path) or len(read_part(path, "labels")) < len(parts[path]):
            to_do.append(path)
    start = time.time()
    upcoming = data.read([parts[path] for path in to_do])
    for done, path in enumerate(to_do, 1):
        encode_part(path, next(upcoming), data.labels[parts[path]], model, args)
        show_progress(done, len(to_do), start)
    wait_for_ranks()
    if rank > 0:
        return 0

    # Join them. There is none of a chunk of which no image was readable.
    paths = [path for path in parts if os.path.exists(path)]
    if paths:
        labels = np.concatenate([read_part(path, "labels") for path in paths])
        codes = (read_part(path, "codes") for path in paths)
        publish(args.out, args.split, meta, codes, labels, args.tokenizer)
    shutil.rmtree(folder)
    require(paths, f"{args.images}: not one readable image")
    unreadable = len(data.items) - len(labels)
    print(f"{args.out}: {len(labels):,} images of {meta['grid']} x {meta['grid']} codes, "
          f"{unreadable:,} images unreadable")
    return 2 if unreadable else 0


def encode_part(path, futures, labels, model, args):
    """Write codes (b, views, h*w) uint8 or uint16 and labels (b,) of the images that are readable

    futures: of all images, from Images.read; labels: theirs.
    """
    device = next(model.parameters()).device
    readable = []
    images = []
    for i, future in enumerate(futures):
        try:
            images.append(future.result())
            readable.append(i)
        except BadInput as error:
            complain(error)
    codes = []
    for same_size in zip(*images):  # from one item per image to one batch per size
        batch = from_uint8(np.stack(same_size)).to(device)
        for view in crops(batch, args.image_size, args.views):
            pieces = [model.encode(piece) for piece in view.split(16)]  # to fit into memory
            codes.append(torch.cat(pieces).flatten(1).cpu().numpy())
    if images:
        codes = np.stack(codes, axis=1).astype(np.min_scalar_type(len(model.codebook()) - 1))
        replace_file(path, partial(np.savez, codes=codes, labels=labels[readable]))


def read_part(path, name):
    try:
        with np.load(path) as arrays:
            return arrays[name]
    except Exception as error:  # numpy raises another kind for each way in which a file is broken
        raise BadInput(f"{path}: damaged, delete it and encode again ({error!r})") from None


def show_progress(done, total, start):
    """How much of the work of the first rank is done and the time left, on one line"""
    if os.environ.get("RANK", "0") == "0":
        left = timedelta(seconds=round((time.time() - start) / done * (total - done)))
        print(f"part {done:,} of {total:,}, {left} left ", end="\r", flush=True)


# ---- 8. Codes as images


def show(args):
    """Decode stored codes: ten images of each of up to ten classes, one class per row"""
    _, _, device = setup()
    meta = read_meta(args.data)
    codes, labels = open_codes(args.data, meta, SUFFIX[args.split])
    path = args.tokenizer or meta["tokenizer"]
    require(path, f"{args.data}: names no tokenizer, expected --tokenizer")
    model = load_tokenizer(path, device, meta)

    classes = np.unique(labels)
    classes = classes[np.linspace(0, len(classes) - 1, min(10, len(classes))).astype(int)]
    rows = [np.flatnonzero(labels == label)[:10] for label in classes]
    images = []
    for row in rows:
        some = torch.from_numpy(codes[row, 0].astype(np.int64))
        require(some.max() < meta["vocab"], f"{codes.filename}: {some.max()}, expected codes from "
                                            f"0 to {meta['vocab'] - 1}")
        some = rearrange(some, "b (h w) -> b h w", h=meta["grid"]).to(device)
        images.append(to_uint8(model.decode(some)))
    save_images(args.out, images, labels[np.concatenate(rows)])
    names = [meta["classes"][label] for label in classes]
    print(f"{args.out}: row by row {', '.join(names)}")
    return 0


def reconstruct(args):
    """Images to codes and back, and the PSNR of the reconstructions

    OUT is a .png, rows of images and below each its reconstruction, or an .npz of all
    reconstructions. Their FID is a bound for every model on these codes.
    """
    _, _, device = setup()
    is_npz = args.out.endswith(".npz")
    require(is_npz or args.out.endswith(".png"), f"{args.out}: expected a .png or an .npz")
    model = load_tokenizer(args.tokenizer, device)
    check_image_size(args.image_size, model)
    edge = args.image_size - 2 * args.margin
    require(edge > 0, f"--margin is {args.margin}, expected less than half of --image_size")
    inside = slice(args.margin, args.margin + edge)
    data = Images(args.images, [args.image_size])
    rows = []  # of the picture
    errors = []

    def reconstructions():
        for futures in data.read(data.chunks(16)):
            images = np.stack([future.result()[0] for future in futures])
            again = to_uint8(model.decode(model.encode(from_uint8(images).to(device))))
            difference = images.astype(float) - again
            errors.append(np.square(difference[:, inside, inside]).sum())
            if not rows or (len(rows) < 6 and len(images) >= 10):
                rows.extend([images[:10], again[:10]])
            yield again

    if is_npz:
        save_images(args.out, reconstructions(), data.labels)
    else:
        for _ in reconstructions():
            pass  # it collects rows and errors
        save_images(args.out, rows, np.arange(len(rows)).repeat(len(rows[0])))
    psnr = math.inf
    if sum(errors) > 0:
        psnr = 10 * np.log10(255**2 * len(data.items) * 3 * edge**2 / sum(errors))
    print(f"{args.out}: PSNR {psnr:.2f} dB, {len(data.items):,} images")
    return 0


# ---- 9. Processes, and the command line


def setup():
    """-> this process's rank, the number of ranks, and its device; torchrun sets the environment"""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        require(processes <= gpus, f"{processes} processes, expected one for each GPU: {gpus}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # TF32 rounds: the codes made on a GPU would differ from those made on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if world_size > 1 and not dist.is_initialized():
        # A day: ranks wait for one that saves or draws. One that ends is noticed at once anyway.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return rank, world_size, device


def wait_for_ranks():
    if dist.is_initialized():
        try:
            dist.all_reduce(torch.zeros(1))  # on the CPU, where a rank that has ended is noticed
        except RuntimeError:
            raise BadInput("another rank ended before the work was done") from None


def complain(error, program="tokenizer.py"):
    """One line, whatever a file is called"""
    print(f"{program}: {' '.join(str(error).split())[:1000]}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Errors of one line, where argparse prints the usage too"""

    def error(self, message):
        raise BadInput(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default, and the description in its own lines"""


def integers(text):
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers like 4,2,1") from None


def numbers(text):
    return [float(x) for x in text.split(",")]


def parse(argv):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND",
                                     help="COMMAND --help lists its flags")
    limits = {}  # of the numbers

    def command(run, source, out):
        added = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0],
                                    description=inspect.cleandoc(run.__doc__), allow_abbrev=False,
                                    formatter_class=HelpFormatter)
        added.set_defaults(run=run)
        added.add_argument(source, help=f"as {source.upper()} in tokenizer.py --help")
        added.add_argument("out", help=f"{out} to write")
        return added

    def number(command, name, default, lowest, highest, text, kind=int):
        command.add_argument(f"--{name}", type=kind, default=default, help=text)
        limits[name] = (lowest, highest)

    one = command(train, "images", "file")
    number(one, "image_size", 256, 1, 1024, "pixels a side")
    number(one, "steps", 12000, 1, 2**31, "steps")
    number(one, "batch", 16, 1, 65536, "images a step")
    number(one, "lr", 1e-3, 0, 2**31, "learning rate", float)
    number(one, "seed", 0, 0, 2**31, "of weights and batches")
    number(one, "codebook_size", 256, 1, 65536, "codes")
    number(one, "ch", 32, 1, 1024, "channels, a multiple of 32")
    number(one, "ch_mult", "1,1,2", 1, 16, "channels of each level, times ch", integers)
    number(one, "z_channels", 32, 1, 4096, "channels before the codebook")

    one = command(encode, "images", "folder")
    one.add_argument("--tokenizer", required=True, default=argparse.SUPPRESS,
                     help="its file")
    number(one, "image_size", 256, 1, 1024, "pixels a side")
    one.add_argument("--split", choices=["train", "val"], default="train",
                     help="part of the data set, to train on or to validate with")
    one.add_argument("--views", choices=["center", "one", "ten_crop"], default="center",
                     help="center has the mirror image too, one has not; val: center or one")
    number(one, "scales", "1.1", 1, 4, "sizes that ten_crop cuts from, in multiples of "
           "image_size; 1.1,1.05 makes 20 views", numbers)

    one = command(show, "data", ".png")
    one.add_argument("--tokenizer", help="its file, if not the one that the data set names")
    one.add_argument("--split", choices=["train", "val"], default="train",
                     help="part of the data set, to train on or to validate with")

    one = command(reconstruct, "images", ".png or .npz")
    one.add_argument("--tokenizer", required=True, default=argparse.SUPPRESS,
                     help="its file")
    number(one, "image_size", 256, 1, 1024, "pixels a side")
    number(one, "margin", 0, 0, 1024, "pixels a side that the PSNR leaves out")

    args = parser.parse_args(argv)
    for name, (lowest, highest) in limits.items():
        for value in np.atleast_1d(getattr(args, name, lowest)):  # NaN is in no range
            require(lowest <= value <= highest,
                    f"--{name} is {value}, expected {lowest} to {highest}")
    return args


def main(argv=None):
    """-> exit code"""
    try:
        args = parse(argv)
        require(args.run is encode or os.environ.get("WORLD_SIZE", "1") == "1",
                f"{args.run.__name__} runs in one process, torchrun started several")
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


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
