"""FID and its family, computed as the ADM evaluator computes them.

    python fid.py SAMPLES REFERENCE --weights pt_inception-2015-12-05-6726825d.pth [--json]
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE --weights WEIGHTS
    python fid.py IMAGES REFERENCE --save --weights WEIGHTS    # statistics, to compare with later

SAMPLES: an .npz whose `arr_0` is uint8 (n, H, W, 3), read in a stream, or a folder of images.
REFERENCE: the same, or statistics (mu, sigma, mu_s, sigma_s), or both in one .npz, as in ADM's: mu
and sigma of all real images, some of them in arr_0. WEIGHTS: if left out, features.pt beside it.

The protocol (openai/guided-diffusion, evaluations/evaluator.py):
    input  uint8 -> float32 -> 299 x 299, bilinear as in TensorFlow 1 -> (x - 128) / 128
    FID    Frechet distance of 2048 pooled features, covariance with n - 1
    sFID   the same of the first 7 channels of mixed_6/conv (after ReLU) at 17 x 17 places
    IS     softmax of features . W, without bias; mean over splits of 5000, in file order
    P, R   k = 3, arr_0 of REFERENCE against all samples, in float32; the original's float16
           distances move P by about 0.001 and R by about 0.002
    KID    not ADM's: Binkowski et al. 2018, the unbiased form, over all pairs
All but KID depend on n: `real_against_real` is the distance for n images of arr_0, over ten draws.
Only Inception's 2048 features make a FID; those of another network make a FD(its name).

Not checked, for want of the published weights and TensorFlow: that real images give ADM's numbers.
ADM's README has FID 3.94, sFID 6.14, IS 215.84, P 0.8265, R 0.5309, to compare with the output of
    python fid.py admnet_guided_upsampled_imagenet256.npz VIRTUAL_imagenet256_labeled.npz
"""

import json
import os
import sys
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from scipy.linalg import lapack

from common import (BadInput, Machine, Parser, brief, generator, load_file, one_line_errors,
                    progress, sha256, write_atomically)

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LEADER = os.environ.get("RANK", "0") == "0"  # of the ranks that torchrun starts

# Inception V3. A block is branches side by side, a branch is convolutions and pools in a row, named
# as in torchvision less "branch"; channels and kernels are those of the weights. Zeros around keep
# the size, except after / (stride 2) and ! (stride 1); + puts the channels of two side by side.
STEM = "Conv2d_1a_3x3/ Conv2d_2a_3x3! Conv2d_2b_3x3 half Conv2d_3b_1x1 Conv2d_4a_3x3! half"
A = "1x1, 5x5_1 5x5_2, 3x3dbl_1 3x3dbl_2 3x3dbl_3, mean _pool"                          # 35 x 35
B = "3x3/, 3x3dbl_1 3x3dbl_2 3x3dbl_3/, half"                                           # -> 17
C = "1x1, 7x7_1 7x7_2 7x7_3, 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5, mean _pool"  # 17 x 17
D = "3x3_1 3x3_2/, 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/, half"                              # -> 8
E = "1x1, 3x3_1 3x3_2a+3x3_2b, 3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b, mean _pool"       # 8 x 8
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D,
          "7b": E, "7c": E.replace("mean", "max")}  # as the graph of 2015-12-05 has it
POOLS = {"half": lambda x: F.max_pool2d(x, 3, 2), "max": lambda x: F.max_pool2d(x, 3, 1, 1),
         "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)}

def interpolation(n, size=299):
    """Matrix (size, n) that resizes as TensorFlow 1: pixel i comes from i * n / size"""
    source = (torch.arange(size) * (n / size)).clamp(max=n - 1)
    return (1 - (source[:, None] - torch.arange(n)).abs()).clamp(min=0)

class Inception:
    """Inception V3 of 2015-12-05 from its state dict: uint8 (B, H, W, 3) -> what FID, sFID take"""
    names, widths = ("FID", "sFID"), (2048, 2023)

    def __init__(self, state, device="cpu"):
        self.fc, self.convs = state["fc.weight"].reshape(1008, 2048).to(device), {}
        for name in (key.removesuffix(".conv.weight") for key in state if ".conv." in key):
            weight, gain, bias, mean, var = (state[f"{name}.{key}"].to(device) for key in (
                "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
            gain = gain * (var + 1e-3).rsqrt()  # batch norm becomes part of the convolution
            weight = (weight * gain[:, None, None, None]).to(memory_format=torch.channels_last)
            self.convs[name] = weight, bias - mean * gain
        self(torch.zeros(1, 9, 9, 3, device=device))  # weights that do not fit show here

    def conv(self, x, name):
        weight, bias = self.convs[name.rstrip("/!")]
        padding = "valid" if name[-1] in "/!" else "same"
        return F.conv2d(x, weight, bias, 1 + (name[-1] == "/"), padding).relu_()

    def path(self, x, steps, prefix=""):
        for step in steps.split():
            x = POOLS[step](x) if step in POOLS else torch.cat(
                [self.conv(x, prefix + name) for name in step.split("+")], 1)
        return x

    def __call__(self, images):
        rows, columns = (interpolation(n).to(images.device) for n in images.shape[1:3])
        x = rearrange(images.float(), "b h w c -> b c h w")
        x = (rows @ x @ columns.T - 128) / 128                    # (B, 3, 299, 299)
        x = self.path(x, STEM)                                    # (B, 192, 35, 35)
        for block, branches in BLOCKS.items():                    # (B, 2048, 8, 8) in the end
            prefix = f"Mixed_{block}.branch"
            x = torch.cat([self.path(x, steps, prefix) for steps in branches.split(",")], 1)
            if block == "6d":                                     # 1x1 has the first channels
                spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")
        return x.mean((2, 3)), spatial

    def logits(self, features):
        return features @ self.fc.T  # without bias, as in ADM's Inception Score

class Classifier(nn.Module):
    """The small network of an embedded data set: uint8 (B, H, W, 3) -> (features (B, 96),)"""
    widths = (96,)

    def __init__(self, name, classes):
        super().__init__()
        self.names, c = (f"FD({name})",), (3, 16, 32, 32, 64, 96)
        self.body = nn.Sequential(*(nn.Sequential(
            nn.Conv2d(c[i], c[i + 1], 3, stride=1 + i % 2, padding=1, bias=False),
            nn.BatchNorm2d(c[i + 1]), nn.ReLU()) for i in range(5)))
        self.logits = nn.Linear(96, classes)

    def forward(self, images):
        x = rearrange((images.float() - 128) / 128, "b h w c -> b c h w")
        return (self.body(x).mean((2, 3)),)

def load_network(path, device="cpu"):
    """The published Inception, or the Classifier of a features.pt. Raises BadInput."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file; FID takes {URL}{WEIGHTS}, sha256 {WEIGHTS_SHA256}")
    saved, digest = load_file(path), sha256(path)
    try:
        if "model" in saved:
            net = Classifier(saved["name"], len(saved["model"]["logits.bias"])).to(device).eval()
            net.load_state_dict(saved["model"])
        else:
            net = Inception(saved, device)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: expected {WEIGHTS} or a features.pt ({brief(error)})") from None
    if isinstance(net, Inception) and digest != WEIGHTS_SHA256:
        print(f"warning: {path} is not {WEIGHTS} (sha256 {WEIGHTS_SHA256})", file=sys.stderr)
    net.sha256, net.device = digest, device
    return net

class Moments:
    """Mean and covariance of a stream of features (b, d) in float64, from one all-reducible matrix:
    the sum of [1 x]^T [1 x], which holds the count, the sums and the products"""

    def __init__(self, d, device="cpu"):
        self.sums = torch.zeros(1 + d, 1 + d, dtype=torch.float64, device=device)

    def update(self, x):
        x = F.pad(x.double(), (1, 0), value=1.0)                  # (b, 1 + d)
        self.sums += x.T @ x

    def statistics(self):
        """mu (d,), cov (d, d) with n - 1"""
        sums = self.sums.cpu().numpy()
        n, mu = sums[0, 0], sums[0, 1:] / sums[0, 0]
        return mu, (sums[1:, 1:] - n * np.outer(mu, mu)) / (n - 1)

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2), float64.

    With cov1 = A A^T and cov2 = B B^T the root's trace is the sum of the singular values of A^T B,
    free of the covariances' null spaces, whose rounding errors a square root would blow up."""
    def factor(cov):  # (d, d) of rank r -> (d, r), pivoted Cholesky
        lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
        return np.tril(lower)[np.argsort(pivots), :rank]
    a, b = sorted((factor(cov1), factor(cov2)), key=lambda f: f.shape[1])
    k = a.T @ b                                                   # (r, s), r <= s
    root = np.sqrt(np.linalg.eigvalsh(k @ k.T).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)

def inception_score(logits, split=5000):
    """logits (n, classes) -> mean over splits of exp(mean KL(p(y|x) || p(y)))"""
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)                               # (split, classes)
        kl = log_p.exp() * (log_p - log_p.logsumexp(0) + np.log(len(part)))
        scores.append(kl.sum(1).mean().exp().item())
    return float(np.mean(scores))

def precision_recall(reference, samples, k=3):
    """Features (m, d), (n, d) -> share of samples no farther from some reference than that one's
    k-th neighbour among the references, and the reverse (Kynkaanniemi et al. 2019)"""
    def share(x, y):  # kthvalue counts from 1, and the first neighbour is the point itself
        radii = torch.cat([torch.cdist(part, y).kthvalue(k + 1).values for part in y.split(500)])
        inside = [(torch.cdist(part, y) <= radii).any(1) for part in x.split(500)]
        return torch.cat(inside).double().mean().item()
    return share(samples, reference), share(reference, samples)

def kid(x, y):
    """Features (n, d), (m, d) -> unbiased MMD^2 with the kernel (x.y/d + 1)^3; may be negative"""
    def mean(a, b, skip=0):  # over all pairs, or without those of an image with itself
        total = sum(((part @ b.T / b.shape[1] + 1) ** 3).sum() for part in a.split(500))
        return (total - skip * (((a**2).mean(1) + 1) ** 3).sum()) / (len(a) * (len(b) - skip))
    x, y = x.double(), y.double()
    return (mean(x, x, skip=1) + mean(y, y, skip=1) - 2 * mean(x, y)).item()

@contextmanager
def reading(path):
    try:
        yield
    except Exception as error:  # each way in which a file is broken raises another kind
        raise BadInput(f"{path}: expected an .npz or a folder of images, but {error}") from None

class Images:
    """A folder's images, or arr_0 of an .npz, read as they are sliced: 50,000 would be 9.8 GB"""

    def __init__(self, path):
        self.path, self.labels, self.files = path, None, []
        with reading(path):
            if os.path.isdir(path):
                files = (os.path.join(where, f) for where, _, names in os.walk(path) for f in names)
                self.files = sorted(f for f in files if f.lower().endswith(("png", "jpg", "jpeg")))
                self.shape = (len(self.files),)
            else:
                self.npz = np.load(path)  # held, for the stream would close with it
                self.labels, self.stream = self.npz.get("labels"), self.npz.zip.open("arr_0.npy")
                np.lib.format.read_magic(self.stream)
                self.shape, _, dtype = np.lib.format.read_array_header_1_0(self.stream)
                self.start, self.size = self.stream.tell(), int(np.prod(self.shape[1:]))
                labels = self.shape[:1] if self.labels is None else self.labels.shape
                if dtype != np.uint8 or self.shape[3:] != (3,) or labels != self.shape[:1]:
                    raise ValueError(f"{dtype} {self.shape}, labels {labels}; not uint8 (n,H,W,3)")
            if len(self) < 4:
                raise ValueError(f"{len(self)} images are too few for 3 nearest neighbours")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        images = []
        for file in self.files[part]:
            with reading(file):
                images.append(np.array(Image.open(file).convert("RGB")))
        first, last, _ = part.indices(len(self))
        with reading(self.path):
            if images:
                return np.stack(images)
            self.stream.seek(self.start + first * self.size)
            data = bytearray(self.stream.read((last - first) * self.size))
            return np.frombuffer(data, np.uint8).reshape(last - first, *self.shape[1:])

def open_reference(path, net):
    """-> [(mu, cov) of each of the network's outputs] or [], Images or None: what is there"""
    if os.path.isdir(path):
        return [], Images(path)
    with reading(path), np.load(path) as z:
        stats = [(z["mu" + s].astype(float), z["sigma" + s].astype(float))
                 for s, _ in zip(("", "_s"), net.widths) if "mu" + s in z]
        if z.get("sha256", net.sha256) != net.sha256:
            raise ValueError(f"statistics of features {z['sha256']}, but these are {net.sha256}")
        for (mu, cov), d in zip(stats, net.widths):
            if mu.shape != (d,) or cov.shape != (d, d) or not np.isfinite(cov).all():
                raise ValueError(f"mu {mu.shape} and sigma {cov.shape}, not of {d} features")
        return stats, Images(path) if "arr_0" in z or not stats else None

@torch.no_grad()
def extract(net, images, keep=True, batch=64):
    """-> features (n, d) in order, if to be kept, and Moments of each output; equal on all ranks"""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = len(images) * rank // world, len(images) * (rank + 1) // world
    features = torch.zeros(len(images) if keep else 0, net.widths[0], device=net.device)
    moments, start = [Moments(d, net.device) for d in net.widths], time.time()
    for i in range(first, last, batch):
        j = min(i + batch, last)
        outputs = net(torch.from_numpy(images[i:j]).to(net.device))
        for m, x in zip(moments, outputs):
            m.update(x)
        if keep:
            features[i:j] = outputs[0]
        if LEADER and (j == last or i // batch % 10 == 0):
            progress(j - first, 0, last - first, start, sys.stderr)           # of this rank
    if world > 1:
        for tensor in [features] + [m.sums for m in moments]:
            dist.all_reduce(tensor)  # features are zero where another rank's rows are
    return features, moments

def evaluate(net, images, labels, reference):
    """images, labels or None, path of a reference -> dict of results, in the order to print"""
    given, real = open_reference(reference, net)
    x, moments = extract(net, images)
    y, others = extract(net, real) if real else (None, [])
    report = {"features": net.names[0], "sha256": net.sha256, "d": net.widths[0], "n": len(x)}
    for name, m, other in zip(net.names, moments, given or [m.statistics() for m in others]):
        report[name] = frechet_distance(*m.statistics(), *other)
    if given and real and len(x) <= len(y):
        order = generator(0).permutation(len(y))[:len(y) // len(x) * len(x)]
        draws = rearrange(y[order].double().cpu().numpy(), "(k n) d -> k n d", n=len(x))[:10]
        report["real_against_real"] = float(np.mean([
            frechet_distance(z.mean(0), np.cov(z, rowvar=False), *given[0]) for z in draws]))
    if real:
        report["n_reference"], report["KID"] = len(y), kid(x, y)
        report["precision"], report["recall"] = precision_recall(y, x)
    if isinstance(net, Inception):
        report["IS"] = inception_score(net.logits(x))
    elif labels is not None:
        report["class_accuracy"] = float(np.mean(net.logits(x).argmax(1).cpu().numpy() == labels))
    return report

def small_report(images, labels, folder):
    """uint8 images (n, H, W, 3), labels (n,), folder of data -> one line of text"""
    net = load_network(os.path.join(folder, "features.pt"))
    report = evaluate(net, images, labels, os.path.join(folder, "reference.npz"))
    return (f"{net.names[0]} {report[net.names[0]]:.2f}, as many real images get "
            f"{report['real_against_real']:.2f}; class accuracy {report['class_accuracy']:.1%}")

def save_reference(path, net, images, **arrays):
    """Write the statistics of images, with more arrays, as an .npz to compare with later"""
    arrays["sha256"] = np.array(net.sha256)
    for s, m in zip(("", "_s"), extract(net, images, keep=False)[1]):
        arrays["mu" + s], arrays["sigma" + s] = m.statistics()

    def write(f):
        with zipfile.ZipFile(f, "w", zipfile.ZIP_BZIP2) as z:  # images get smaller than by savez
            for name, array in arrays.items():
                with z.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array)
    if LEADER:
        write_atomically(path, write)

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("samples")
    parser.add_argument("reference")
    parser.add_flag("weights", "", f"{WEIGHTS} or a features.pt")
    parser.add_flag("save", False, "write statistics to REFERENCE instead")
    parser.add_flag("json", False, "one line of JSON instead of a table")
    args = parser.parse_args(argv)
    beside = os.path.join(os.path.dirname(args.reference), "features.pt")
    default = beside if os.path.exists(beside) else WEIGHTS
    net = load_network(args.weights or default, Machine().device)
    torch.set_float32_matmul_precision("highest")  # ten bits of mantissa would show in the result
    torch.backends.cudnn.allow_tf32 = False
    images = Images(args.samples)
    if args.save:
        save_reference(args.reference, net, images)
        return 0
    report = evaluate(net, images, images.labels, args.reference)
    rows = [f"{k:24} {v if isinstance(v, str) else format(v, '.6g')}" for k, v in report.items()]
    if LEADER:
        print(json.dumps(report) if args.json else "\n".join(rows))
    return 0

if __name__ == "__main__":
    sys.exit(main())
