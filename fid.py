"""FID and its family, computed as the ADM evaluator computes them, in one file that stands alone.

    python fid.py SAMPLES REFERENCE --weights pt_inception-2015-12-05-6726825d.pth [--json]
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE --weights WEIGHTS
    python fid.py IMAGES REFERENCE --save --weights WEIGHTS    # statistics, to compare with later

SAMPLES is an .npz whose `arr_0` is uint8 (n, H, W, 3), or a folder of images of one size.
REFERENCE is the same, or statistics (mu, sigma, mu_s, sigma_s), or both in one .npz. ADM's files
hold both: mu and sigma of all real images, and some of these images in arr_0.
WEIGHTS, if left out, is the features.pt beside REFERENCE, else Inception's file in this folder.

The protocol (openai/guided-diffusion, evaluations/evaluator.py):
    input  uint8 -> float32 -> 299 x 299, bilinear as in TensorFlow 1 -> (x - 128) / 128
    FID    Frechet distance of the 2048 pooled features; covariances divide by n - 1
    sFID   the same of the first 7 channels of mixed_6/conv (after ReLU) at 17 x 17 places
    IS     softmax of features @ W, without the bias; mean over splits of 5000, in file order
    P, R   precision and recall: k = 3, arr_0 of REFERENCE against all samples, in float32. ADM's
           distances are float16, which moves P by about 0.001 and R by about 0.002.
    KID    not in ADM: Binkowski et al. 2018, the unbiased form, over all pairs
All but KID depend on n, the number of samples. `real_against_real` is the distance that n real
images of arr_0 get, averaged over ten draws: samples cannot be expected to get a smaller one.
Only Inception's 2048 features make a FID; those of another network make a FD(its name).

Not checked, for want of the published weights and TensorFlow: that real images give ADM's numbers.
ADM's README has FID 3.94, sFID 6.14, IS 215.84, P 0.8265, R 0.5309, to compare with the output of
    python fid.py admnet_guided_upsampled_imagenet256.npz VIRTUAL_imagenet256_labeled.npz
"""

import argparse
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from scipy.linalg import lapack
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""


# ---- 1. Inception V3 of 2015-12-05, with the names of torchvision's Inception3 -------------------

class BasicConv2d(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x):
    # The graph of 2015-12-05 does not count the zeros around the image, as torchvision does.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    def __init__(self, c, c_pool):
        super().__init__()
        self.branch1x1 = BasicConv2d(c, 64, 1)
        self.branch5x5_1 = BasicConv2d(c, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(c, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3)
        self.branch_pool = BasicConv2d(c, c_pool, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([one, five, three, self.branch_pool(mean_pool(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3 = BasicConv2d(c, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = BasicConv2d(c, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    def __init__(self, c, c7):
        super().__init__()
        self.branch1x1 = BasicConv2d(c, 192, 1)
        self.branch7x7_1 = BasicConv2d(c, c7, 1)
        self.branch7x7_2 = BasicConv2d(c7, c7, (1, 7))
        self.branch7x7_3 = BasicConv2d(c7, 192, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(c, c7, 1)
        self.branch7x7dbl_2 = BasicConv2d(c7, c7, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(c7, c7, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(c7, c7, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(c7, 192, (1, 7))
        self.branch_pool = BasicConv2d(c, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, self.branch_pool(mean_pool(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(c, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = BasicConv2d(c, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        seven = self.branch7x7x3_4(seven)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = BasicConv2d(c, 320, 1)
        self.branch3x3_1 = BasicConv2d(c, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(c, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1))
        self.branch_pool = BasicConv2d(c, 192, 1)
        self.pool = pool

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(three), self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x))], 1)


def interpolation(n, size=299):
    """Matrix (size, n) that resizes n pixels as TensorFlow 1: pixel i comes from i * n / size"""
    source = (torch.arange(size) * (n / size)).clamp(max=n - 1)
    distance = (source[:, None] - torch.arange(n)).abs()          # (size, n)
    return (1 - distance).clamp(min=0)


class Inception(nn.Module):
    """uint8 images (B, H, W, 3) -> pooled features (B, 2048) for FID, spatial (B, 2023) for sFID

    load_state_dict takes the published file WEIGHTS, strictly."""
    names = ("FID", "sFID")
    widths = (2048, 2023)

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, padding=0)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, mean_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)  # torchvision has a mean here
        self.fc = nn.Linear(2048, 1008)
        self.eval()                                 # its batch norms are never trained

    def forward(self, images):
        rows = interpolation(images.shape[1]).to(images.device)
        columns = interpolation(images.shape[2]).to(images.device)
        x = rearrange(images.float(), "b h w c -> b c h w")
        x = (rows @ x @ columns.T - 128) / 128                    # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)                          # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)                          # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))        # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")     # the first of its branch1x1
        x = self.Mixed_6e(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))        # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def logits(self, features):
        return features @ self.fc.weight.T  # without bias, as in ADM's Inception Score


def fold_batch_norms(net):
    """Make each frozen batch norm a part of the convolution before it, which is faster"""
    for module in net.modules():
        if isinstance(module, BasicConv2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()


# ---- 2. The small network of an embedded data set, and loading either network --------------------

def conv_block(c_in, c_out, stride):
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """uint8 images (B, H, W, 3) -> (features (B, 96),)"""
    widths = (96,)

    def __init__(self, name, classes):
        super().__init__()
        self.names = (f"FD({name})",)
        self.body = nn.Sequential(
            conv_block(3, 16, stride=1),
            conv_block(16, 32, stride=2),
            conv_block(32, 32, stride=1),
            conv_block(32, 64, stride=2),
            conv_block(64, 96, stride=1))
        self.logits = nn.Linear(96, classes)

    def forward(self, images):
        x = rearrange((images.float() - 128) / 128, "b h w c -> b c h w")
        return (self.body(x).mean((2, 3)),)


def load_file(path):
    """torch.load of tensors and plain values, without running code -> the object, its sha256"""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if zipfile.is_zipfile(path):  # torch.load itself does not notice a flipped bit
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True), digest
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # each way in which a file is broken raises another kind
        # The error's own words are left out: torch advises to load such a file as code.
        raise BadInput(f"{path}: expected a file of weights; this one is truncated, damaged or "
                       f"holds something else ({type(error).__name__})") from None


def load_network(path, device="cpu"):
    """The published Inception, or the Classifier of a features.pt. Raises BadInput."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file; FID takes {WEIGHTS_URL}, sha256 {WEIGHTS_SHA256}")
    saved, digest = load_file(path)
    try:
        if "model" in saved:
            state = saved["model"]
            net = Classifier(saved["name"], len(state["logits.bias"]))
        else:
            state = saved
            net = Inception()
        net.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error)[:300]
        raise BadInput(f"{path}: expected {WEIGHTS} or a features.pt ({reason})") from None
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds NaN or infinity, expected finite weights")

    if isinstance(net, Inception):
        fold_batch_norms(net)
    net.path = path
    net.sha256 = digest
    net.device = device
    return net.eval().to(device, memory_format=torch.channels_last)


# ---- 3. The metrics ------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of a stream of features (b, d), in float64

    All is in one matrix, the sum of [1 x]^T [1 x] over all x: it holds the count, the sums and the
    products. So the matrices of several ranks can simply be added."""

    def __init__(self, d, device="cpu"):
        self.sums = torch.zeros(1 + d, 1 + d, dtype=torch.float64, device=device)

    def update(self, x):
        x = F.pad(x.double(), (1, 0), value=1.0)                  # (b, 1 + d)
        self.sums += x.T @ x

    def statistics(self):
        """mu (d,), cov (d, d) with n - 1. Raises BadInput."""
        sums = self.sums.cpu().numpy()
        n = sums[0, 0]
        if n < 2:
            raise BadInput(f"{n:.0f} images are too few for a covariance")
        mu = sums[0, 1:] / n
        cov = (sums[1:, 1:] - n * np.outer(mu, mu)) / (n - 1)
        return mu, cov


def cholesky_factor(cov):
    """(d, d) of rank r -> A (d, r) with cov = A A^T, by pivoted Cholesky"""
    lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
    unpermuted = np.tril(lower)[np.argsort(pivots)]
    return unpermuted[:, :rank]


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2), float64

    With cov1 = A A^T and cov2 = B B^T the root's trace is the sum of the singular values of A^T B.
    That is free of the covariances' null spaces, whose rounding errors a square root blows up."""
    product = cholesky_factor(cov1).T @ cholesky_factor(cov2)     # (r1, r2)
    if product.shape[0] > product.shape[1]:
        product = product.T  # the same singular values, and a smaller square below
    squares = np.linalg.eigvalsh(product @ product.T)             # squared singular values
    trace_of_root = np.sqrt(squares.clip(0)).sum()
    shift = ((mu1 - mu2) ** 2).sum()
    return float(shift + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root)


def inception_score(logits, split=5000):
    """logits (n, classes) -> mean over splits of exp(mean KL(p(y|x) || p(y)))"""
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)                               # (split, classes)
        log_mean_p = log_p.logsumexp(0) - math.log(len(part))     # (classes,)
        kl = (log_p.exp() * (log_p - log_mean_p)).sum(1)          # (split,)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores))


def share_inside(x, manifold, k):
    """Share of the points x that lie no farther from a point of the manifold than its k-th
    neighbour in the manifold"""
    radii = []
    for part in manifold.split(500):
        distances = torch.cdist(part, manifold)                   # (500, m)
        radii.append(distances.kthvalue(k + 1).values)            # the nearest is the point itself
    radii = torch.cat(radii)                                      # (m,)
    inside = []
    for part in x.split(500):
        inside.append((torch.cdist(part, manifold) <= radii).any(1))
    return torch.cat(inside).double().mean().item()


def precision_recall(reference, samples, k=3):
    """Features (m, d), (n, d) -> share of the samples inside the reference's manifold, and the
    share of the reference inside the samples' (Kynkaanniemi et al. 2019). Raises BadInput."""
    fewest = min(len(reference), len(samples))
    if fewest <= k:
        raise BadInput(f"{fewest} images are too few for {k} nearest neighbours")
    return share_inside(samples, reference, k), share_inside(reference, samples, k)


def kid(x, y):
    """Features (n, d), (m, d) -> unbiased MMD^2 with the kernel (x.y/d + 1)^3; may be negative"""
    def sum_over_pairs(a, b):
        return sum(((part @ b.T / d + 1) ** 3).sum() for part in a.split(500))

    def mean_over_other_pairs(a):  # without those of an image with itself
        with_itself = (((a**2).mean(1) + 1) ** 3).sum()
        return (sum_over_pairs(a, a) - with_itself) / (len(a) * (len(a) - 1))

    x = x.double()
    y = y.double()
    d = x.shape[1]
    between = sum_over_pairs(x, y) / (len(x) * len(y))
    return (mean_over_other_pairs(x) + mean_over_other_pairs(y) - 2 * between).item()


# ---- 4. Images and references --------------------------------------------------------------------

def list_images(folder):
    """The image files in a folder and the folders in it, sorted. Links to folders are not followed,
    so that no image is counted twice."""
    def refuse(error):  # os.walk would pass a folder that it cannot read over in silence
        raise BadInput(f"{error.filename}: cannot be listed ({error.strerror})")

    files = []
    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if name.lower().endswith((".png", ".jpg", ".jpeg")):
                files.append(os.path.join(parent, name))
    return sorted(files)


def read_image(file):
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # each kind of damage raises another kind
        raise BadInput(f"{file}: not a readable image ({error})") from None


def read_arrays(path, names):
    """Those of the named arrays that an .npz holds -> {name: array}. Raises BadInput."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # each way in which a file is broken raises another kind
        raise BadInput(f"{path}: expected a folder or an .npz, but {error}") from None
    return arrays


class Images:
    """The images of a folder, or arr_0 of an .npz: images[first:last] is uint8 (n, H, W, 3)

    They are read when they are sliced, for 50,000 of 256 x 256 pixels take 9.8 GB. labels are those
    of the .npz, (n,), or None. Raises BadInput."""

    def __init__(self, path):
        self.path = path
        self.labels = None
        self.files = []
        if os.path.isdir(path):
            self.files = list_images(path)
            self.shape = (len(self.files),)
        else:
            self.open_npz()
        if len(self) < 4:
            raise BadInput(f"{path}: {len(self)} images are too few for 3 nearest neighbours")
        if self.files:
            self.shape += read_image(self.files[0]).shape

    def open_npz(self):
        """Read the labels and the header of arr_0"""
        try:
            self.arr_0 = zipfile.ZipFile(self.path).open("arr_0.npy")
            np.lib.format.read_magic(self.arr_0)
            self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.arr_0)
        except Exception as error:  # each way in which a file is broken raises another kind
            raise BadInput(f"{self.path}: expected a folder or an .npz with arr_0, "
                           f"but {error}") from None
        self.start = self.arr_0.tell()
        order = "Fortran order" if fortran else "C order"
        if dtype != np.uint8 or fortran or self.shape[3:] != (3,) or 0 in self.shape:
            raise BadInput(f"{self.path}: arr_0 is {dtype} {self.shape} in {order}, "
                           "expected uint8 (n, H, W, 3) in C order")

        self.labels = read_arrays(self.path, ["labels"]).get("labels")
        if self.labels is None:
            return
        if self.labels.shape != self.shape[:1] or self.labels.dtype.kind not in "iu":
            raise BadInput(f"{self.path}: labels {self.labels.shape} are {self.labels.dtype}, "
                           f"expected integers ({len(self)},)")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, last, _ = rows.indices(len(self))
        if self.files:
            return self.read_files(self.files[first:last])
        size = math.prod(self.shape[1:])                          # bytes of an image
        try:
            self.arr_0.seek(self.start + first * size)
            data = bytearray(self.arr_0.read((last - first) * size))
            return np.frombuffer(data, np.uint8).reshape(last - first, *self.shape[1:])
        except Exception as error:  # each way in which a file is broken raises another kind
            raise BadInput(f"{self.path}: arr_0 is damaged ({error})") from None

    def read_files(self, files):
        images = []
        for file in files:
            image = read_image(file)
            if image.shape != self.shape[1:]:
                raise BadInput(f"{file}: {image.shape}, expected the same shape as "
                               f"{self.files[0]}, {self.shape[1:]}")
            images.append(image)
        return np.stack(images)


def check_statistics(name, mu, cov, d):
    if mu.shape != (d,) or cov.shape != (d, d) or mu.dtype.kind != "f" or cov.dtype.kind != "f":
        raise BadInput(f"{name}: {mu.dtype} {mu.shape}, {cov.dtype} {cov.shape}, expected floats "
                       f"({d},), ({d}, {d})")
    if not np.isfinite(mu).all() or not np.isfinite(cov).all():
        raise BadInput(f"{name}: NaN or infinity, expected finite numbers")
    asymmetry = np.abs(cov - cov.T).max()
    if asymmetry > 1e-3 * np.abs(cov).max() or np.diag(cov).min() < 0:
        raise BadInput(f"{name}: expected a covariance, symmetric and with no variance below 0")


def open_reference(path, net):
    """-> [(mu, cov)] for the network's outputs that have statistics here, Images or None

    Raises BadInput."""
    if os.path.isdir(path):
        return [], Images(path)
    arrays = read_arrays(path, ["mu", "sigma", "mu_s", "sigma_s", "sha256"])
    digest = str(arrays.get("sha256", net.sha256))
    if digest != net.sha256:
        raise BadInput(f"{path}: its statistics are of features of sha256 {digest}, expected those "
                       f"of {net.path}, {net.sha256}")

    statistics = []
    for suffix, d in zip(["", "_s"], net.widths):
        mu = arrays.get("mu" + suffix)
        cov = arrays.get("sigma" + suffix)
        if mu is None or cov is None:
            break
        check_statistics(f"{path}: mu{suffix}, sigma{suffix}", mu, cov, d)
        statistics.append((mu.astype(float), cov.astype(float)))
    with zipfile.ZipFile(path) as archive:
        holds_images = "arr_0.npy" in archive.namelist()
    if statistics and not holds_images:
        return statistics, None
    return statistics, Images(path)


# ---- 5. From images to scores --------------------------------------------------------------------

def progress(before, done, total, start):
    """Show how many images are done and the time left: on a terminal in one line, in a file at
    every tenth of the images after the first ten seconds"""
    seconds = time.time() - start
    minutes_left, seconds_left = divmod(int(seconds / done * (total - done)), 60)
    line = f"{done:,} of {total:,} images, {minutes_left}:{seconds_left:02} left"
    if sys.stderr.isatty():
        end = "\r" if done < total else "\n"
        print(f"{line:<60}", end=end, file=sys.stderr, flush=True)
    elif seconds > 10 and done * 10 // total > before * 10 // total:
        print(line, file=sys.stderr, flush=True)


def sum_over_ranks(tensor):
    """The sum of a tensor of each rank, by way of the CPU: gloo notices when a rank has ended"""
    total = tensor.cpu()
    try:
        dist.all_reduce(total)
    except RuntimeError:
        raise BadInput("stopped, because another rank has ended: see what it printed") from None
    return total.to(tensor.device)


@torch.no_grad()
def extract(net, images, keep=True, batch=64, rank=0, world=1):
    """-> features (n, d) in order, or (0, d) if not to be kept, and [Moments] of each output

    Every rank reads its share of the images; the results are the same on all. Raises BadInput."""
    n = len(images)
    first = n * rank // world
    last = n * (rank + 1) // world
    features = torch.zeros(n if keep else 0, net.widths[0], device=net.device)
    moments = [Moments(d, net.device) for d in net.widths]
    start = time.time()
    for i in range(first, last, batch):
        j = min(i + batch, last)
        outputs = net(torch.from_numpy(images[i:j]).to(net.device))
        for moment, output in zip(moments, outputs):
            moment.update(output)
        if keep:
            features[i:j] = outputs[0]
        if rank == 0:
            progress(i - first, j - first, last - first, start)

    if world > 1:
        features = sum_over_ranks(features)  # zero where another rank's rows are
        for moment in moments:
            moment.sums = sum_over_ranks(moment.sums)
    for moment in moments:
        if not moment.sums.isfinite().all():
            raise BadInput(f"{net.path}: makes features that are NaN or infinite")
    return features, moments


def write_atomically(path, data):
    """Write bytes beside `path`, then rename: a crash or a full disk leaves the old file intact"""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror
        raise BadInput(f"{path}: cannot be written, nothing is changed ({reason})") from None
    finally:
        if os.path.lexists(part):
            os.remove(part)


def save_reference(path, net, images, rank=0, world=1, **arrays):
    """Write the statistics of images, with more arrays, as an .npz to compare with later

    Rank 0 writes. Raises BadInput."""
    _, moments = extract(net, images, keep=False, rank=rank, world=world)
    arrays["sha256"] = np.array(net.sha256)
    for suffix, moment in zip(["", "_s"], moments):
        mu, cov = moment.statistics()
        arrays["mu" + suffix] = mu
        arrays["sigma" + suffix] = cov
    if rank > 0:
        return
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_BZIP2) as archive:  # smaller than np.savez makes it
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    write_atomically(path, data.getvalue())


def real_against_real(features, n, mu, cov):
    """Mean distance to mu, cov of up to ten disjoint draws of n of the features of real images"""
    order = np.random.default_rng(0).permutation(len(features))
    draws = min(10, len(features) // n)
    distances = []
    for i in range(draws):
        rows = order[i * n:(i + 1) * n]
        draw = features[rows].double().cpu().numpy()              # (n, d)
        draw_cov = np.cov(draw, rowvar=False)
        distances.append(frechet_distance(draw.mean(0), draw_cov, mu, cov))
    return float(np.mean(distances))


def evaluate(net, images, labels, reference, rank=0, world=1):
    """Score images, uint8 (n, H, W, 3) or Images, against a reference

    net: from load_network; labels: (n,) or None; reference: a path. -> dict of results, in the
    order to print, the same on all ranks. Raises BadInput."""
    given, real = open_reference(reference, net)
    features, moments = extract(net, images, rank=rank, world=world)
    statistics = given
    if real is not None:
        real_features, real_moments = extract(net, real, rank=rank, world=world)
    if not given:
        statistics = [moment.statistics() for moment in real_moments]

    n = len(features)
    report = {"features": net.names[0], "sha256": net.sha256, "d": net.widths[0], "n": n}
    for name, moment, (mu, cov) in zip(net.names, moments, statistics):
        report[name] = frechet_distance(*moment.statistics(), mu, cov)
    if len(statistics) < len(net.names) and rank == 0:
        print(f"{reference}: has no mu_s and sigma_s, so sFID is left out", file=sys.stderr)
    if real is not None:
        if given and n <= len(real_features):
            report["real_against_real"] = real_against_real(real_features, n, *given[0])
        report["n_reference"] = len(real_features)
        report["KID"] = kid(features, real_features)
        report["precision"], report["recall"] = precision_recall(real_features, features)
    if isinstance(net, Inception):
        report["IS"] = inception_score(net.logits(features))
    elif labels is not None:
        predicted = net.logits(features).argmax(1).cpu().numpy()
        report["class_accuracy"] = float(np.mean(predicted == labels))

    for name, value in report.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{reference}: {name} is {value} against it, expected a finite number")
    return report


# ---- 6. Command line -----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse(argv):
    parser = Parser(prog="fid.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("reference")
    parser.add_argument("--weights", help=f"{WEIGHTS} or a features.pt")
    parser.add_argument("--save", action="store_true", help="write statistics to REFERENCE instead")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    args = parser.parse_args(argv)
    if args.weights is None:
        args.weights = os.path.join(os.path.dirname(args.reference), "features.pt")
        if not os.path.exists(args.weights):
            args.weights = WEIGHTS
    return args


def pick_device():
    """The GPU of this rank, or the CPU"""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks_here > torch.cuda.device_count():
        raise BadInput(f"{ranks_here} processes here, expected at most one for each of "
                       f"{torch.cuda.device_count()} GPUs")
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would show in the results
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def run(args, rank, world):
    net = load_network(args.weights, pick_device())
    if isinstance(net, Inception) and net.sha256 != WEIGHTS_SHA256 and rank == 0:
        print(f"warning: {net.path} is not {WEIGHTS}, sha256 {WEIGHTS_SHA256}", file=sys.stderr)
    images = Images(args.samples)
    if args.save:
        folder = os.path.dirname(os.path.abspath(args.reference))
        if os.path.isdir(args.reference) or not os.path.isdir(folder):
            raise BadInput(f"{args.reference}: expected a file to write, in a folder that exists")
        save_reference(args.reference, net, images, rank, world)
        return
    report = evaluate(net, images, images.labels, args.reference, rank, world)
    if rank > 0:
        return
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        if not isinstance(value, str):
            value = f"{value:.6g}"
        print(f"{name:24} {value}")


def main(argv=None):
    """-> exit code: 0, or 2 with one line on stderr for what cannot be used"""
    rank = int(os.environ.get("RANK", 0))  # torchrun sets these
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        args = parse(argv)
        if world > 1:
            dist.init_process_group("gloo")
        run(args, rank, world)
        return 0
    except BadInput as error:
        line = " ".join(str(error).split())
        print(f"fid.py: {line}", file=sys.stderr)
        return 2
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("fid.py: stopped", file=sys.stderr)
        sys.exit(130)
