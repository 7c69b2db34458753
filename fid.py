"""FID and its family, computed as the ADM evaluator computes them, in one file that stands alone.

    python fid.py SAMPLES REFERENCE --weights pt_inception-2015-12-05-6726825d.pth [--json]
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE --weights WEIGHTS
    python fid.py IMAGES REFERENCE --save --weights WEIGHTS    # statistics, to compare with later

SAMPLES is an .npz whose `arr_0` is uint8 (n, H, W, 3), or a folder of images of one size.
REFERENCE is the same, or statistics (mu, sigma, mu_s, sigma_s), or both in one .npz. ADM's files
hold both: mu and sigma of all real images, and some of these images in arr_0.
WEIGHTS, if left out: the features.pt beside REFERENCE, else Inception's file in this folder.

The protocol (openai/guided-diffusion, evaluations/evaluator.py):
    input  uint8 -> float32 -> 299 x 299, bilinear as in TensorFlow 1 -> (x - 128) / 128
    FID    Frechet distance of the 2048 pooled features; covariances divide by n - 1
    sFID   the same of the first 7 channels of mixed_6/conv (after ReLU) at 17 x 17 places
    IS     softmax of features @ W, without the bias; mean over splits of 5000, in file order
    P, R   precision and recall, k = 3, arr_0 of REFERENCE against all samples, in float32: ADM's
           float16 distances move P by about 0.001 and R by about 0.002
    KID    not in ADM: Binkowski et al. 2018, the unbiased form, over all pairs
All but KID depend on n, the number of samples. `real_against_real` is the distance that n real
images of arr_0 get, over ten draws: samples cannot be expected to get a smaller one.
Only Inception's 2048 features make a FID; those of another network make a FD(its name).

Not checked, as we do not have the published weights: that real images give ADM's numbers. ADM's
README has FID 3.94, sFID 6.14, IS 215.84, P 0.8265, R 0.5309, to compare with the output of
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
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from numpy.lib.npyio import NpzFile
from PIL import Image
from scipy.linalg import lapack
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class BadInput(Exception):
    """Something the user gave cannot be used: one line on stderr, exit code 2"""


def refuse(reason):
    raise BadInput(reason)


def require(condition, reason):
    if not condition:
        refuse(reason)


@contextmanager
def reading(path, expected):
    """Name the file in whatever goes wrong inside, for each kind of damage raises another error"""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(". ")[0]  # torch goes on to advise loading the file as code
        raise BadInput(f"{path}: expected {expected}, but {reason}") from None


# ---- 1. Inception V3 of 2015-12-05, with the names of torchvision's Inception3 -------------------

class Conv(nn.Module):
    """What torchvision calls BasicConv2d"""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# The graph of 2015-12-05 does not count the zeros around the image, as torchvision does.
MEAN_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Branches(nn.Module):
    """Branches side by side, each a dict of the layers that follow one another

    A branch may end in a fork: Branches again, whose layers are named as layers of this block."""

    def __init__(self, *branches):
        super().__init__()
        # A list does not register its modules; the loop below does, by the published names.
        self.branches = [nn.Sequential(*branch.values()) for branch in branches]
        for branch in branches:
            for name, layer in branch.items():
                if isinstance(layer, Branches):
                    for fork_name, fork_layer in layer.named_children():
                        self.add_module(fork_name, fork_layer)
                else:
                    self.add_module("branch" + name, layer)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception_a(c, c_pool):
    return Branches(
        {"1x1": Conv(c, 64, 1)},
        {"5x5_1": Conv(c, 48, 1), "5x5_2": Conv(48, 64, 5)},
        {"3x3dbl_1": Conv(c, 64, 1), "3x3dbl_2": Conv(64, 96, 3), "3x3dbl_3": Conv(96, 96, 3)},
        {"mean": MEAN_POOL, "_pool": Conv(c, c_pool, 1)})


def inception_c(c, c7):
    return Branches(
        {"1x1": Conv(c, 192, 1)},
        {"7x7_1": Conv(c, c7, 1), "7x7_2": Conv(c7, c7, (1, 7)), "7x7_3": Conv(c7, 192, (7, 1))},
        {"7x7dbl_1": Conv(c, c7, 1), "7x7dbl_2": Conv(c7, c7, (7, 1)),
         "7x7dbl_3": Conv(c7, c7, (1, 7)), "7x7dbl_4": Conv(c7, c7, (7, 1)),
         "7x7dbl_5": Conv(c7, 192, (1, 7))},
        {"mean": MEAN_POOL, "_pool": Conv(c, 192, 1)})


def inception_e(c, pool):
    fork = Branches({"3x3_2a": Conv(384, 384, (1, 3))}, {"3x3_2b": Conv(384, 384, (3, 1))})
    dbl_fork = Branches({"3x3dbl_3a": Conv(384, 384, (1, 3))},
                        {"3x3dbl_3b": Conv(384, 384, (3, 1))})
    return Branches(
        {"1x1": Conv(c, 320, 1)},
        {"3x3_1": Conv(c, 384, 1), "fork": fork},
        {"3x3dbl_1": Conv(c, 448, 1), "3x3dbl_2": Conv(448, 384, 3), "fork": dbl_fork},
        {"pool": pool, "_pool": Conv(c, 192, 1)})


def interpolation(n, size=299):
    """Matrix (size, n) that resizes n pixels as TensorFlow 1: pixel i comes from i * n / size"""
    source = (torch.arange(size) * (n / size)).clamp(max=n - 1)
    distance = (source[:, None] - torch.arange(n)).abs()          # (size, n)
    return (1 - distance).clamp(min=0)


class Inception(nn.Module):
    """uint8 images (B, H, W, 3) -> pooled features (B, 2048) for FID, spatial (B, 2023) for sFID"""
    names = ("FID", "sFID")
    widths = (2048, 2023)

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = inception_a(192, 32)
        self.Mixed_5c = inception_a(256, 64)
        self.Mixed_5d = inception_a(288, 64)
        self.Mixed_6a = Branches(
            {"3x3": Conv(288, 384, 3, 2, 0)},
            {"3x3dbl_1": Conv(288, 64, 1), "3x3dbl_2": Conv(64, 96, 3),
             "3x3dbl_3": Conv(96, 96, 3, 2, 0)},
            {"max": nn.MaxPool2d(3, stride=2)})
        self.Mixed_6b = inception_c(768, 128)
        self.Mixed_6c = inception_c(768, 160)
        self.Mixed_6d = inception_c(768, 160)
        self.Mixed_6e = inception_c(768, 192)
        self.Mixed_7a = Branches(
            {"3x3_1": Conv(768, 192, 1), "3x3_2": Conv(192, 320, 3, 2, 0)},
            {"7x7x3_1": Conv(768, 192, 1), "7x7x3_2": Conv(192, 192, (1, 7)),
             "7x7x3_3": Conv(192, 192, (7, 1)), "7x7x3_4": Conv(192, 192, 3, 2, 0)},
            {"max": nn.MaxPool2d(3, stride=2)})
        self.Mixed_7b = inception_e(1280, MEAN_POOL)
        # The graph of 2015-12-05 has a maximum here, torchvision a mean.
        self.Mixed_7c = inception_e(2048, nn.MaxPool2d(3, stride=1, padding=1))
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
        spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")     # 7 channels of its branch1x1
        x = self.Mixed_6e(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))        # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def logits(self, features):
        return features @ self.fc.weight.T  # without bias, as in ADM's Inception Score


# ---- 2. The small network of an embedded data set, and loading either network --------------------

class Classifier(nn.Module):
    """uint8 images (B, H, W, 3) -> (features (B, 96),)"""
    widths = (96,)

    def __init__(self, name, classes):
        super().__init__()
        self.names = (f"FD({name})",)
        self.body = nn.Sequential()
        for c_in, c_out, stride in (3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 96, 1):
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            self.body.append(nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU()))
        self.logits = nn.Linear(96, classes)

    def forward(self, images):
        x = rearrange((images.float() - 128) / 128, "b h w c -> b c h w")
        return (self.body(x).mean((2, 3)),)


def load_network(path, device="cpu"):
    """The published Inception, or the Classifier of a features.pt. Raises BadInput."""
    expected = f"{WEIGHTS_URL}, sha256 {WEIGHTS_SHA256}, or a features.pt"
    with reading(path, expected), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if zipfile.is_zipfile(file):  # torch.load itself does not notice a flipped bit
            require(zipfile.ZipFile(file).testzip() is None, "a checksum is wrong")
        with warnings.catch_warnings(action="ignore"):  # torch warns of some files that it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "model" in state:
            net = Classifier(state["name"], len(state["model"]["logits.bias"]))
            state = state["model"]
        else:
            net = Inception()
        net.load_state_dict(state)
        for name, tensor in state.items():
            require(tensor.isfinite().all(), f"{name} holds NaN or infinity")

    # A frozen batch norm can be a part of the convolution before it, which is faster.
    for module in net.modules():
        if isinstance(module, Conv):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    net.path = path
    net.sha256 = digest
    net.device = device
    return net.eval().to(device, memory_format=torch.channels_last)


# ---- 3. The metrics ------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of a stream of features (b, d), in float64

    The sum of [1 x]^T [1 x] holds count, sums and products; ranks add theirs up."""

    def __init__(self, d, device="cpu"):
        self.sums = torch.zeros(1 + d, 1 + d, dtype=torch.float64, device=device)

    def update(self, x):
        one_x = F.pad(x.double(), (1, 0), value=1.0)              # (b, 1 + d)
        self.sums += one_x.T @ one_x

    def statistics(self):
        """mu (d,), cov (d, d) with n - 1"""
        sums = self.sums.cpu().numpy()
        n = sums[0, 0]
        mu = sums[0, 1:] / n
        return mu, (sums[1:, 1:] - n * np.outer(mu, mu)) / (n - 1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2), float64

    With cov1 = A A^T and cov2 = B B^T the root's trace is the sum of the singular values of A^T B.
    That is free of the covariances' null spaces, whose rounding errors a square root blows up."""
    def factor(cov):  # (d, d) of rank r -> (d, r), by pivoted Cholesky
        lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
        order = np.argsort(pivots)                                # undoes the pivoting
        return np.tril(lower)[order, :rank]

    product = factor(cov1).T @ factor(cov2)                       # (r1, r2)
    if product.shape[0] > product.shape[1]:
        product = product.T  # the same singular values, and a smaller square below
    squares = np.linalg.eigvalsh(product @ product.T)             # squared singular values
    trace_of_root = np.sqrt(squares.clip(0)).sum()                # rounding can make 0 negative
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root)


def inception_score(logits, split=5000):
    """logits (n, classes) -> mean over splits of exp(mean KL(p(y|x) || p(y)))"""
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)                               # (split, classes)
        log_mean_p = log_p.logsumexp(0) - math.log(len(part))     # (classes,)
        kl = (log_p.exp() * (log_p - log_mean_p)).sum(1)          # (split,)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores))


def precision_recall(reference, samples, k=3):
    """Features (m, d), (n, d) -> precision, recall (Kynkaanniemi et al. 2019)

    Around each point of a set lies a ball that reaches to its k-th neighbour in the set. Precision
    is the share of the samples inside some ball of the reference, recall is the reverse."""
    def share(x, manifold):
        # The nearest neighbour of a point is the point itself, and kthvalue counts from 1.
        radii = [torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(500)]
        radii = torch.cat(radii)
        inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in x.split(500)]
        return torch.cat(inside).double().mean().item()

    return share(samples, reference), share(reference, samples)


def kid(x, y):
    """Features (n, d), (m, d) -> unbiased MMD^2 with the kernel (x.y/d + 1)^3; may be negative"""
    def kernel_sum(a, b):  # over all pairs
        return sum(((part @ b.T / b.shape[1] + 1) ** 3).sum() for part in a.split(500))

    def mean_within(a):  # over all pairs but those of an image with itself
        with_itself = (((a**2).mean(1) + 1) ** 3).sum()
        return (kernel_sum(a, a) - with_itself) / (len(a) * (len(a) - 1))

    x = x.double()
    y = y.double()
    mean_between = kernel_sum(x, y) / (len(x) * len(y))
    return (mean_within(x) + mean_within(y) - 2 * mean_between).item()


# ---- 4. Images and references --------------------------------------------------------------------

class Images:
    """The images of a folder, or arr_0 of an .npz: images[first:last] is uint8 (n, H, W, 3)

    They are read when they are sliced, for 50,000 of 256 x 256 pixels take 9.8 GB. labels are those
    of the .npz, (n,), or None. Raises BadInput."""

    def __init__(self, path):
        self.path = path
        self.labels = None
        self.files = []
        with reading(path, "a folder of images or an .npz"):
            if os.path.isdir(path):
                self.list_files()
            else:
                self.open_npz()
            require(len(self) > 3, f"{len(self)} images are too few for 3 nearest neighbours")

    def list_files(self):
        # Links to folders are not followed, so that no image counts twice. Without onerror a folder
        # that cannot be read would be passed over in silence.
        for folder, _, names in os.walk(self.path, onerror=refuse):
            for name in names:
                if name.lower().endswith((".png", ".jpg", ".jpeg")):
                    self.files.append(os.path.join(folder, name))
        self.files.sort()
        self.shape = (len(self.files),)

    def open_npz(self):
        arrays = NpzFile(self.path)
        self.labels = arrays.get("labels")
        self.arr_0 = arrays.zip.open("arr_0.npy")
        np.lib.format.read_magic(self.arr_0)
        self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.arr_0)
        self.start = self.arr_0.tell()
        require(not fortran, "arr_0 is in Fortran order, not in C order")
        require(dtype == np.uint8 and self.shape[3:] == (3,) and 0 not in self.shape,
                f"arr_0 is {dtype} {self.shape}, not uint8 (n, H, W, 3)")
        require(self.labels is None or self.labels.shape == self.shape[:1],
                f"labels {np.shape(self.labels)} are not one for each of {len(self)} images")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        images = []
        for file in self.files[rows]:
            with reading(file, "an image"), Image.open(file) as image:
                images.append(np.array(image.convert("RGB")))
        with reading(self.path, "undamaged images of one size"):
            if self.files:
                return np.stack(images)
            first, last, _ = rows.indices(len(self))
            size = math.prod(self.shape[1:])                      # bytes of an image
            self.arr_0.seek(self.start + first * size)
            data = bytearray(self.arr_0.read((last - first) * size))
            return np.frombuffer(data, np.uint8).reshape(last - first, *self.shape[1:])


def open_reference(path, net):
    """-> [(mu, cov)] for outputs of the network, as far as they are here, and Images or None"""
    if os.path.isdir(path):
        return [], Images(path)
    statistics = []
    with reading(path, f"an .npz made with {net.path}"), NpzFile(path) as arrays:
        digest = str(arrays.get("sha256", net.sha256))            # ADM's files name none
        require(digest == net.sha256, f"its network's sha256 is {digest}, not {net.sha256}")
        for suffix, d in zip(["", "_s"], net.widths):
            if "mu" + suffix not in arrays:
                break
            mu = arrays["mu" + suffix].astype(float)
            cov = arrays["sigma" + suffix].astype(float)
            require(mu.shape == (d,) and cov.shape == (d, d),
                    f"mu{suffix} is {mu.shape}, sigma{suffix} {cov.shape}, not of {d} features")
            require(np.isfinite(mu).all() and np.isfinite(cov).all(), "it holds NaN or infinity")
            statistics.append((mu, cov))
        if statistics and "arr_0" not in arrays:
            return statistics, None
    return statistics, Images(path)


# ---- 5. From images to scores --------------------------------------------------------------------

@torch.no_grad()
def extract(net, images, keep=True, batch=64, rank=0, world=1):
    """-> features (n, d) in order, or (0, d) if not to be kept, and [Moments] of each output

    The ranks take turns, a batch each, and all of them get the same result. Raises BadInput."""
    n = len(images)
    features = torch.zeros(n if keep else 0, net.widths[0], device=net.device)
    moments = [Moments(d, net.device) for d in net.widths]
    start = time.time()
    for i in range(rank * batch, n, world * batch):
        outputs = net(torch.from_numpy(images[i:i + batch]).to(net.device))
        for moment, output in zip(moments, outputs):
            moment.update(output)
        if keep:
            features[i:i + batch] = outputs[0]
        if rank == 0 and sys.stderr.isatty():
            done = min(1, (i + world * batch) / n)
            minutes = (time.time() - start) * (1 - done) / done / 60
            line = f"{done:4.0%} of the images, {minutes:.1f} minutes left "
            print(line, end="\r" if done < 1 else "\n", file=sys.stderr, flush=True)

    if world > 1:
        try:
            for tensor in [features] + [moment.sums for moment in moments]:
                total = tensor.cpu()  # gloo, which is for CPUs, notices when a rank has ended
                dist.all_reduce(total)  # features are zero where another rank's rows are
                tensor.copy_(total)
        except RuntimeError:
            raise BadInput("stopped, because another rank has ended: see its message") from None
    for moment in moments:
        require(moment.sums.isfinite().all(), f"{net.path}: makes features that are not finite")
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
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.lexists(part):
            os.remove(part)


def save_reference(path, net, images, rank=0, world=1, **arrays):
    """Write the statistics of images, and more arrays, to an .npz. Raises BadInput."""
    _, moments = extract(net, images, keep=False, rank=rank, world=world)
    arrays["sha256"] = net.sha256
    for suffix, moment in zip(["", "_s"], moments):
        arrays["mu" + suffix], arrays["sigma" + suffix] = moment.statistics()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_BZIP2) as archive:  # smaller than np.savez makes it
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array, allow_pickle=False)
    if rank == 0:
        write_atomically(path, data.getvalue())


def real_against_real(features, n, mu, cov):
    """Mean distance to mu, cov of up to ten disjoint draws of n of the features of real images"""
    order = np.random.default_rng(0).permutation(len(features))
    distances = []
    for i in range(min(10, len(features) // n)):
        draw = features[order[i * n:(i + 1) * n]].double().cpu().numpy()  # (n, d)
        distances.append(frechet_distance(draw.mean(0), np.cov(draw, rowvar=False), mu, cov))
    return float(np.mean(distances))


def evaluate(net, images, labels, reference, rank=0, world=1):
    """Score images, uint8 (n, H, W, 3) or Images, with labels (n,) or None, against the reference
    at a path -> dict of results, in the order to print, equal on all ranks. Raises BadInput."""
    given, real = open_reference(reference, net)
    features, moments = extract(net, images, rank=rank, world=world)
    if real is not None:
        real_features, real_moments = extract(net, real, rank=rank, world=world)
    statistics = given if given else [moment.statistics() for moment in real_moments]
    if len(statistics) < len(net.names) and rank == 0:
        print(f"{reference}: has no mu_s and sigma_s, so sFID is left out", file=sys.stderr)

    n = len(features)
    report = {"features": net.names[0], "sha256": net.sha256, "d": net.widths[0], "n": n}
    for name, moment, (mu, cov) in zip(net.names, moments, statistics):
        report[name] = frechet_distance(*moment.statistics(), mu, cov)
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
    return report


# ---- 6. Command line -----------------------------------------------------------------------------

def run(argv):
    parser = argparse.ArgumentParser("fid.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("samples")
    parser.add_argument("reference")
    parser.add_argument("--weights", help=f"{WEIGHTS} or a features.pt")
    parser.add_argument("--save", action="store_true", help="write statistics to REFERENCE instead")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    args = parser.parse_args(argv)
    beside = os.path.join(os.path.dirname(args.reference), "features.pt")
    default = beside if os.path.exists(beside) else WEIGHTS
    weights = args.weights if args.weights else default

    rank = int(os.environ.get("RANK", 0))  # torchrun sets these
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would show in the results

    net = load_network(weights, device)
    if isinstance(net, Inception) and net.sha256 != WEIGHTS_SHA256 and rank == 0:
        print(f"warning: {weights} is not {WEIGHTS}, sha256 {WEIGHTS_SHA256}", file=sys.stderr)
    images = Images(args.samples)
    if args.save:
        folder = os.path.dirname(os.path.abspath(args.reference))
        require(os.path.isdir(folder), f"{folder}: no such folder to write {args.reference} in")
        save_reference(args.reference, net, images, rank, world)
        return
    report = evaluate(net, images, images.labels, args.reference, rank, world)
    if rank == 0 and args.json:
        print(json.dumps(report))
    elif rank == 0:
        for name, value in report.items():
            text = value if isinstance(value, str) else f"{value:.6g}"
            print(f"{name:24} {text}")


def main(argv=None):
    """-> exit code: 0, or with one line on stderr 2 after bad input and 130 after a signal"""
    try:
        run(argv)
        return 0
    except BadInput as error:
        print("fid.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fid.py: stopped", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():  # threads of a group that is left open abort the exit at times
            dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
