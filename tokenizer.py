"""Images to codes and back: the VQGAN of LlamaGen

An encoder shrinks the image by f = 2^(levels - 1), each of the h x w vectors that are left is
replaced by the nearest of a few codes, and a decoder turns codes back into an image.

    python tokenizer.py train IMAGES tokenizer.pt --image_size 32     # a small one of one's own
    python tokenizer.py encode IMAGES DATA --tokenizer tokenizer.pt   # codes for npp.py --data DATA
    python tokenizer.py encode IMAGES_VAL DATA --tokenizer tokenizer.pt --split val
    python tokenizer.py reconstruct IMAGES out.png --tokenizer tokenizer.pt    # before/after, PSNR

IMAGES is a folder with one sub-folder per class, or an .npz of `arr_0` uint8 (n, H, W, 3),
`labels` (n,) and perhaps `classes`, their names.

Shapes: B images, S pixels a side, h = w = S/f codes a side, C codes in the book, D width of one.
"""

import json
import os
import shutil
import sys
from itertools import zip_longest

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common import (BadInput, Machine, Parser, brief, from_uint8, generator, load_file,
                    one_line_errors, save_grid, sha256, to_uint8, write_atomically)

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
        return self.render(self.codebook()[codes])

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

class Images(Dataset):
    """A class folder or an .npz. An item is uint8 (S, S, 3), or a str saying why it is unreadable.

    items: file names or arrays; labels: int64 (n,); classes: their names. Raises BadInput."""
    def __init__(self, source, image_size):
        self.image_size = image_size
        read = read_folder if os.path.isdir(source) else read_npz
        self.items, self.labels, self.classes = read(source)
        if not len(self.items):
            raise BadInput(f"{source}: no images, expected one sub-folder per class")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            item = self.items[i]
            image = Image.open(item) if isinstance(item, str) else Image.fromarray(item)
            return np.asarray(center_crop(image.convert("RGB"), self.image_size))
        except Exception as error:  # PIL raises many kinds; the caller names the file and goes on
            return f"{self.items[i]}: unreadable image ({brief(error)})"

    def batches(self, size=64):
        """The items in order, read in worker processes -> lists of at most `size`"""
        workers = os.cpu_count() if isinstance(self.items[0], str) else 0
        return DataLoader(self, size, num_workers=workers, collate_fn=list)

def read_folder(path):
    classes = sorted(d.name for d in os.scandir(path) if d.is_dir())
    files = [sorted(f.path for f in os.scandir(os.path.join(path, c)) if f.name[0] != ".")
             for c in classes]
    labels = np.repeat(np.arange(len(classes)), [len(f) for f in files])
    return sum(files, []), labels, classes

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

# ---- 3. Commands -------------------------------------------------------------------------------

def train(args):
    """Train a small VQModel on squared error: LlamaGen's perceptual and adversarial losses need
    pretrained networks. Codes not used for 100 steps move onto features of the current batch, so
    that the whole book is put to work."""
    data = Images(args.images, args.image_size)
    images = readable([data[i] for i in range(len(data))])
    torch.manual_seed(args.seed)
    device = Machine().device
    model = VQModel(args.codebook_size, 8, args.ch, args.ch_mult, args.z_channels).to(device)
    fits(args.image_size, model)
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
    """Images -> uint8 (n, S, S, 3), or BadInput for the first that is unreadable"""
    for item in items:
        if isinstance(item, str):
            raise BadInput(item)
    return np.stack(items)

def open_both(args):
    data, device = Images(args.images, args.image_size), Machine().device
    model = load_tokenizer(args.tokenizer, device)
    fits(args.image_size, model)
    return data, model, device

def fits(image_size, model):
    if image_size % model.factor:
        raise BadInput(f"image_size is {image_size}, expected a multiple of {model.factor}")

def encode(args):
    """Write codes, labels, meta.json and a copy of the tokenizer into the folder args.out

    View 0 is the centre crop, view 1 its mirror image. Unreadable images are named and left out;
    then the exit code is 2."""
    data, model, device = open_both(args)
    vocab, grid = len(model.codebook()), args.image_size // model.factor
    path, suffix = os.path.join(args.out, "meta.json"), "" if args.split == "train" else "_val"
    meta = {"vocab": vocab, "grid": grid, "image_size": args.image_size, "classes": data.classes,
            "tokenizer": "tokenizer.pt", "tokenizer_sha256": sha256(args.tokenizer),
            "made_by": "tokenizer.py encode"}
    if suffix:
        with open(path, "rb") as f:
            if f.read() != json.dumps(meta, indent=1).encode():
                raise BadInput(f"{path}: the training split has other classes, size or tokenizer")
    codes, kept = [], []
    for items in data.batches():
        images = [x for x in items if not isinstance(x, str)]
        for message in (x for x in items if isinstance(x, str)):
            print(f"\ntokenizer.py: {message}", file=sys.stderr)
        if images:
            x = from_uint8(np.stack(images)).to(device)
            views = [x, x.flip(-1)] if args.views == "center" else [x]
            views = torch.stack([model.encode(v).flatten(1) for v in views], dim=1)
            codes.append(views.cpu().numpy().astype(np.uint8 if vocab <= 256 else np.uint16))
        kept += [not isinstance(x, str) for x in items]
        print(f"\r{len(kept):,} of {len(data):,} images", end="", flush=True)
    if not codes:
        raise BadInput(f"{args.images}: not one readable image")
    codes = np.concatenate(codes)
    for name, array in (("codes", codes), ("labels", data.labels[kept].astype(np.uint16))):
        name = os.path.join(args.out, f"{name}{suffix}.npy")
        write_atomically(name, lambda f, array=array: np.save(f, array))
    copy = os.path.join(args.out, "tokenizer.pt")
    if not os.path.exists(copy) or sha256(copy) != meta["tokenizer_sha256"]:
        shutil.copyfile(args.tokenizer, copy)
    write_atomically(path, lambda f: f.write(json.dumps(meta, indent=1).encode()))
    print(f"\n{args.out}: {len(codes):,} images, {codes.shape[1]} views of {grid} x {grid} codes, "
          f"{len(np.unique(codes))} of {vocab} in use")
    return 0 if all(kept) else 2

def reconstruct(args):
    """Write a picture of images and, below each row, what their codes keep; print the PSNR"""
    data, model, device = open_both(args)
    rows, error, count = [], 0.0, 0
    inside = np.s_[:, args.margin : args.image_size - args.margin,
                   args.margin : args.image_size - args.margin]
    for items in data.batches():
        images = readable(items)
        again = to_uint8(model.decode(model.encode(from_uint8(images).to(device))))
        error += np.square(images[inside].astype(float) - again[inside]).sum()
        count += images[inside].size
        if not rows or len(rows) < 6 and len(images) >= 10:
            rows += [images[:10], again[:10]]
    save_grid(args.out, np.concatenate(rows), len(rows[0]), scale=max(1, 64 // args.image_size))
    print(f"{args.out}: PSNR {10 * np.log10(255**2 * count / error):.2f} dB, {len(data):,} images")
    return 0

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["train", "encode", "reconstruct"])
    parser.add_argument("images", help="folder of class folders, or .npz")
    parser.add_argument("out", help="train: tokenizer.pt; encode: folder; reconstruct: .png")
    for flag, default, text in (
        ("tokenizer", "", "encode, reconstruct: the tokenizer's file"),
        ("image_size", 256, "pixels a side"),
        ("split", "train", "encode: train or val"),
        ("views", "center", "encode: center (with the mirror image) or one (without)"),
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
    for name, right, expected in (("split", ("train", "val"), "train or val"),
                                  ("views", ("center", "one"), "center or one"),
                                  ("ch", range(32, 1025, 32), "a multiple of 32")):
        if getattr(args, name) not in right:
            raise BadInput(f"{name} is {getattr(args, name)}, expected {expected}")
    return {"train": train, "encode": encode, "reconstruct": reconstruct}[args.command](args)

if __name__ == "__main__":
    sys.exit(main())
