"""FID and related scores, computed as ADM's evaluator does, in one self-contained file.

    python fid.py SAMPLES REFERENCE --weights pt_inception-2015-12-05-6726825d.pth [--json]
    python fid.py IMAGES REFERENCE --save --weights WEIGHTS    # save statistics for later

SAMPLES is an .npz whose `arr_0` is uint8 (n, H, W, 3), or a folder of 8-bit images of one size.
REFERENCE is the same, or statistics (mu, sigma, mu_s, sigma_s), or both in one .npz. ADM's files
hold both: mu and sigma of all real images, and some of these images in arr_0.
WEIGHTS, if left out: the features.pt beside REFERENCE, else Inception's file in the current folder.

The protocol (openai/guided-diffusion, evaluations/evaluator.py):
    input  uint8 -> float32 -> 299 x 299, bilinear as in TensorFlow 1 -> (x - 128) / 128
    FID    Frechet distance of the 2048 pooled features; covariances divide by n - 1
    sFID   the same for the first 7 channels of mixed_6/conv (after ReLU) at 17 x 17 positions
    IS     softmax of features @ W, without the bias; mean over splits of 5000, in file order
    P, R   precision and recall, k = 3, arr_0 of REFERENCE against all samples, in float32: ADM's
           float16 distances move P by about 0.001 and R by about 0.002
All depend on n, the number of samples. `real_against_real` is the mean distance of n real images
of arr_0, over up to ten draws: do not expect samples to do better.
Only Inception's 2048 features make an FID; those of another network make an FD(its name).

Not yet run with the published weights. ADM's README has FID 3.94, sFID 6.14, IS 215.84, P 0.8265,
R 0.5309 for admnet_guided_upsampled_imagenet256.npz and VIRTUAL_imagenet256_labeled.npz.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
import torch.nn as nn
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
def naming(path, expected):
    """Any error inside becomes BadInput with the file's name; each library raises its own kind"""
    try:
        yield
    except Exception as error:
        # torch buries its reason in advice on how to load the file anyway.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition(". ")[0]
        reason = " ".join(reason.split())[:300]
        raise BadInput(f"{path}: {reason}; expected {expected}") from None


# ---- 1. Inception V3 of 2015-12-05, with the names of torchvision's Inception3 -------------------

class Conv(nn.Sequential):
    """What torchvision calls BasicConv2d"""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


# The graph of 2015-12-05 leaves padding out of the average; torchvision counts it.
MEAN_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = nn.MaxPool2d(3, stride=2)


class Branches(nn.Module):
    """Parallel branches, each a dict of consecutive layers; the last may be Branches again"""

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
    def fork(name):
        return Branches({name + "a": Conv(384, 384, (1, 3))}, {name + "b": Conv(384, 384, (3, 1))})

    return Branches(
        {"1x1": Conv(c, 320, 1)},
        {"3x3_1": Conv(c, 384, 1), "fork": fork("3x3_2")},
        {"3x3dbl_1": Conv(c, 448, 1), "3x3dbl_2": Conv(448, 384, 3), "fork": fork("3x3dbl_3")},
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
    size = None                                     # any, as it resizes them

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
            {"max": MAX_POOL})
        self.Mixed_6b = inception_c(768, 128)
        self.Mixed_6c = inception_c(768, 160)
        self.Mixed_6d = inception_c(768, 160)
        self.Mixed_6e = inception_c(768, 192)
        self.Mixed_7a = Branches(
            {"3x3_1": Conv(768, 192, 1), "3x3_2": Conv(192, 320, 3, 2, 0)},
            {"7x7x3_1": Conv(768, 192, 1), "7x7x3_2": Conv(192, 192, (1, 7)),
             "7x7x3_3": Conv(192, 192, (7, 1)), "7x7x3_4": Conv(192, 192, 3, 2, 0)},
            {"max": MAX_POOL})
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
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(MAX_POOL(x)))   # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(MAX_POOL(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = rearrange(x[:, :7], "b c h w -> b (h w c)")     # 7 channels of its branch1x1
        x = self.Mixed_6e(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))        # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def logits(self, features):
        return features @ self.fc.weight.T  # without bias, as in ADM's Inception Score


# ---- 2. The small network of an embedded data set, and loading either network --------------------

class Classifier(nn.Module):
    """uint8 images (B, size, size, 3) -> (features (B, 96),)"""
    widths = (96,)

    def __init__(self, name, classes, size=32):
        super().__init__()
        self.names = (f"FD({name})",)
        self.size = (size, size)
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
    with naming(path, f"{WEIGHTS_URL} or a features.pt"), open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "model" in state:
            classes = len(state["model"]["logits.bias"])
            net = Classifier(state["name"], classes, state.get("size", 32))
            state = state["model"]
        else:
            net = Inception()
        net.load_state_dict(state)

    # A frozen batch norm can be folded into the convolution before it, which is faster.
    for module in net.modules():
        if isinstance(module, Conv):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    net.sha256 = sha256
    net.device = device
    return net.eval().to(device, memory_format=torch.channels_last)


# ---- 3. The metrics ------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of a stream of features (b, d), in float64

    One matrix, the sum of [1 x]^T [1 x], holds count, sums and products."""

    def __init__(self, d, device="cpu"):
        self.sums = torch.zeros(1 + d, 1 + d, dtype=torch.float64, device=device)

    def update(self, x):
        one_x = nn.functional.pad(x.double(), (1, 0), value=1.0)  # (b, 1 + d)
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
    That avoids the covariances' null spaces, where a matrix root amplifies rounding errors."""
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


# ---- 4. Images and references --------------------------------------------------------------------

def list_files(top):
    """The files of a folder at any depth, sorted, without hidden files and hidden folders"""
    files = []
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:  # links are fine at the top; deeper ones could go in circles
            path = os.path.join(folder, name)
            require(folder == top or not os.path.islink(path), f"{path}: a link to a folder")
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def read_images(path):
    """Yield the images of a folder, or arr_0 of an .npz, uint8 (H, W, 3), one at a time: 50,000 of
    256 x 256 pixels take 9.8 GB"""
    if os.path.isdir(path):
        files = list_files(path)
        for file in files:
            with naming(file, "8-bit RGB, gray or palette, opaque"), Image.open(file) as image:
                require(image.mode in ("RGB", "L", "P", "1"), f"mode {image.mode}")
                require(not image.has_transparency_data, f"mode {image.mode} with transparency")
                if file == files[0]:
                    size = image.size
                require(image.size == size, f"{image.size} pixels, but {files[0]} has {size}")
                yield np.array(image.convert("RGB"))
        return

    expected = "uint8 (n, H, W, 3) in arr_0, and labels (n,) in arr_1 or labels, if any"
    with naming(path, expected), NpzFile(path) as arrays, arrays.zip.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        require(dtype == np.uint8 and shape[3:] == (3,), f"arr_0 is {dtype} {shape}")
        require(not fortran, "arr_0 is in Fortran order")
        # ADM's sampler saves labels as arr_1, where np.savez(path, *batches) puts more images.
        for name in "arr_1", "labels":
            if name in arrays:
                require(arrays[name].shape == shape[:1], f"{name} is {arrays[name].shape}")
        for _ in range(shape[0]):
            data = file.read(math.prod(shape[1:]))
            yield np.frombuffer(data, np.uint8).reshape(shape[1:])


def read_statistics(path, net):
    """A reference -> [(mu, cov)] of the outputs it has statistics for; whether it has images"""
    if os.path.isdir(path):
        return [], True
    statistics = []
    with naming(path, "an .npz with arr_0, or mu and sigma"), NpzFile(path) as arrays:
        sha256 = str(arrays.get("sha256", net.sha256))            # ADM's files name none
        require(sha256 == net.sha256, f"made with a network of sha256 {sha256}, not {net.sha256}")
        for suffix, d in zip(["", "_s"], net.widths):
            if "mu" + suffix in arrays:
                mu = arrays["mu" + suffix].astype(float)
                cov = arrays["sigma" + suffix].astype(float)
                require(cov.shape == (d, d), f"sigma{suffix} is {cov.shape}, not of {d} features")
                statistics.append((mu, cov))
        require(statistics or "arr_0" in arrays, f"it has {list(arrays)}")
        return statistics, "arr_0" in arrays


# ---- 5. From images to scores --------------------------------------------------------------------

@torch.no_grad()
def extract(net, path, batch=64):
    """Images at a path -> features (n, d) in order, [(mu, cov)] of each output. Raises BadInput."""
    features = []
    # TF32's ten bits of mantissa would show in the results; npp.py may have switched it on.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    moments = [Moments(d, net.device) for d in net.widths]
    reader = read_images(path)
    images = list(islice(reader, batch))
    while images:
        size = images[0].shape[:2]
        require(net.size in (None, size), f"{path}: {size} pixels, the network takes {net.size}")
        outputs = net(torch.from_numpy(np.stack(images)).to(net.device))
        for moment, output in zip(moments, outputs):
            require(output.isfinite().all(), f"{path}: the network's features are not finite")
            moment.update(output)
        features.append(outputs[0])
        if sys.stderr.isatty() and len(features) % 20 == 0:
            print(f"{path}: {len(features) * batch:,} images", file=sys.stderr)
        images = list(islice(reader, batch))
    n = sum(len(part) for part in features)
    require(n > 3, f"{path}: {n} images are too few for 3 nearest neighbours")
    return torch.cat(features), [moment.statistics() for moment in moments]


def save_reference(path, net, images, **arrays):
    """Write statistics of the images at a path, and more arrays, to a new .npz. Raises BadInput."""
    part = f"{path}.{os.getpid()}.part"
    with naming(path, "a new file in a folder that can be written"):
        require(not os.path.lexists(path), "it exists already")
        open(part, "wb").close()  # fails now, not after the work
    try:
        _, statistics = extract(net, images)
        for suffix, (mu, cov) in zip(["", "_s"], statistics):
            arrays["mu" + suffix] = mu
            arrays["sigma" + suffix] = cov
        with naming(path, "space for it"), open(part, "wb") as file:
            np.savez_compressed(file, sha256=net.sha256, **arrays)
        os.rename(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def real_against_real(features, n, mu, cov):
    """Mean distance to mu, cov over up to ten disjoint draws of n real images' features"""
    order = np.random.default_rng(0).permutation(len(features))
    distances = []
    for i in range(min(10, len(features) // n)):
        draw = features[order[i * n:(i + 1) * n]].double().cpu().numpy()  # (n, d)
        distances.append(frechet_distance(draw.mean(0), np.cov(draw, rowvar=False), mu, cov))
    return float(np.mean(distances))


def evaluate(net, samples, reference):
    """Score the samples at a path -> dict of results, in the order to print. Raises BadInput."""
    given, has_images = read_statistics(reference, net)
    if has_images:  # the reference first: what is wrong with it is found before the long part
        real_features, real_statistics = extract(net, reference)
    features, statistics = extract(net, samples)
    n = len(features)
    report = {"features": net.names[0], "sha256": net.sha256, "d": net.widths[0], "n": n}
    expected = given if given else real_statistics
    for name, ours, theirs in zip(net.names, statistics, expected):
        report[name] = frechet_distance(*ours, *theirs)

    if has_images:
        if given and n <= len(real_features):
            report["real_against_real"] = real_against_real(real_features, n, *given[0])
        report["n_reference"] = len(real_features)
        report["precision"], report["recall"] = precision_recall(real_features, features)
    if isinstance(net, Inception):
        report["IS"] = inception_score(net.logits(features))
    elif os.path.isfile(samples):
        with NpzFile(samples) as arrays:
            labels = arrays.get("labels", arrays.get("arr_1"))
        if labels is not None:
            predicted = net.logits(features).argmax(1).cpu().numpy()
            report["class_accuracy"] = float(np.mean(predicted == labels))
    return report


# ---- 6. Command line -----------------------------------------------------------------------------

def main(argv=None):
    """Print the scores, or write statistics. Raises BadInput."""
    parser = argparse.ArgumentParser("fid.py", description=__doc__,
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

    net = load_network(weights, "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(net, Inception) and net.sha256 != WEIGHTS_SHA256:
        print(f"warning: {weights} is not {WEIGHTS}, sha256 {WEIGHTS_SHA256}", file=sys.stderr)
    if args.save:
        save_reference(args.reference, net, args.samples)
        return
    report = evaluate(net, args.samples, args.reference)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        text = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:24} {text}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    try:
        main()
    except BadInput as error:
        print("fid.py:", error, file=sys.stderr)
        sys.exit(2)
