"""What fid.py claims, as tests: python -m pytest test_fid.py"""

import fcntl
import functools
import itertools
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

import fid
from data.fashion import features

HERE = os.path.dirname(os.path.abspath(__file__))
# Images, and what torch-fidelity 0.4.0's FeatureExtractorInceptionV3 makes of them with the weights
# of random_inception(): its outputs "2048" and "logits_unbiased", and the first 7 channels of
# Mixed_6d.branch1x1 as NHWC. `names` and `shapes` are those of its state dict.
INCEPTION = os.path.join(HERE, "data", "golden", "inception_random.npz")


# ---- Helpers -------------------------------------------------------------------------------------

def random(*key):
    return np.random.default_rng(key)


@functools.cache
def random_inception():
    """A state dict of Inception V3 with seeded weights that keep the activations near 1"""
    golden = np.load(INCEPTION)
    names = golden["names"].tolist()
    state = {}
    for i, (name, shape) in enumerate(zip(names, golden["shapes"])):
        x = random(0, i).standard_normal(shape[shape > 0], dtype=np.float32)
        if name.endswith(("bn.weight", "running_var")):
            x = 1 + 0.2 * np.tanh(x)
        elif name.endswith(("conv.weight", "fc.weight")):
            inputs = np.prod(x.shape[1:])
            x = x * np.float32((2 / inputs) ** 0.5)
        else:
            x = 0.1 * x
        state[name] = torch.from_numpy(x)
    return state


@functools.cache
def inception():
    net = fid.Inception()
    net.load_state_dict(random_inception())
    return net


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_inception(), path)
    return str(path)


def random_images(n, seed=0, size=16):
    """Blotches, so that features differ from image to image"""
    coarse = random(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the features.pt of an untrained network and a reference.npz of random images"""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    net = fid.Classifier("toy-classifier", 3)
    torch.save({"model": net.state_dict(), "name": "toy-classifier"}, folder / "features.pt")
    net = fid.load_network(str(folder / "features.pt"))
    fid.save_reference(str(folder / "reference.npz"), net, random_images(300, seed=1),
                       arr_0=random_images(120, seed=2), labels=np.zeros(120, int))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """An .npz of five images, without labels"""
    path = tmp_path_factory.mktemp("few") / "a.npz"
    np.savez(path, arr_0=random_images(5))
    return path


def small_report(images, labels, folder):
    net = fid.load_network(str(folder / "features.pt"))
    return fid.evaluate(net, images, labels, str(folder / "reference.npz"))


def save_folder(folder, images):
    """PNG files, 50 in each class folder"""
    for i, image in enumerate(images):
        path = folder / str(i // 50) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def gaussian(n, d, seed):
    """n draws of d correlated features"""
    rng = random(seed)
    x = rng.standard_normal((n, d))
    mixing = rng.standard_normal((d, d))
    shift = rng.standard_normal(d)
    return x @ mixing + shift


def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def frechet_of_features(x, y):
    """Without covariances: the root's trace is the nuclear norm of the product of the features"""
    mean_x = x.mean(0)
    mean_y = y.mean(0)
    a = (x - mean_x) / (len(x) - 1) ** 0.5
    b = (y - mean_y) / (len(y) - 1) ** 0.5
    shift = np.sum((mean_x - mean_y) ** 2)
    traces = np.sum(a**2) + np.sum(b**2)
    return shift + traces - 2 * np.linalg.norm(a @ b.T, "nuc")


def start(command, **environment):
    """fid.py in a process of its own"""
    return subprocess.Popen([sys.executable, "fid.py"] + command, cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=dict(os.environ, **environment))


def two_ranks(command):
    """Two processes, as torchrun starts them -> (exit code, stdout, stderr) of each"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        ranks.append(start(command, RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=port,
                           LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"))
    results = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        results.append((process.returncode, out, err))
    return results


def reported(capsys, *argv):
    """-> the report on stdout, and what is on stderr"""
    assert fid.main([str(x) for x in argv] + ["--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def refused(capsys, words, *argv):
    """Bad input gives exit code 2, nothing on stdout, and on stderr one line, which is returned"""
    assert fid.main([str(x) for x in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("fid.py: ")
    for word in words:
        assert word in err
    return err


def flip_bit(data, i):
    flipped = bytearray(data)
    flipped[i] ^= 1
    return bytes(flipped)


# ---- 1. Inception --------------------------------------------------------------------------------

def test_inception_has_the_published_shape_and_uses_every_convolution_once():
    used = []

    def note(module, inputs, output):
        used.append(module)

    convolutions = [m for m in inception().modules() if isinstance(m, fid.Conv)]
    hooks = [module.register_forward_hook(note) for module in convolutions]
    inception()(torch.from_numpy(random_images(1)))
    for hook in hooks:
        hook.remove()
    assert sum(weight.numel() for weight in inception().parameters()) == 23_850_960
    assert len(convolutions) == len(used) == len(set(used)) == 94


def test_the_published_names_load_strictly_with_and_without_counts_of_batches():
    state = random_inception()
    assert not any("num_batches_tracked" in name for name in state)
    assert fid.Inception().load_state_dict(state, strict=True)
    assert fid.Inception().load_state_dict(inception().state_dict(), strict=True)


@torch.no_grad()
def test_inception_gives_torch_fidelitys_numbers(inception_file):
    golden = np.load(INCEPTION)
    for net in inception(), fid.load_network(inception_file):  # the second is folded
        pooled, spatial = net(torch.from_numpy(golden["images"]))
        ours = {"features": pooled, "spatial": spatial, "logits": net.logits(pooled)}
        for name, values in ours.items():
            assert values.shape == golden[name].shape
            difference = np.abs(values.numpy() - golden[name]).max()
            assert difference < 1e-5 * np.abs(golden[name]).max()


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (32, 32), (299, 299), (300, 512)])
def test_resize_is_that_of_tensorflow_1(size):
    image = random(0).integers(0, 256, size).astype(np.float64)
    expected = np.empty((299, 299))
    for i in range(299):
        for j in range(299):
            y = i * size[0] / 299
            x = j * size[1] / 299
            y0 = int(y)
            x0 = int(x)
            y1 = min(y0 + 1, size[0] - 1)
            x1 = min(x0 + 1, size[1] - 1)
            above = image[y0]
            below = image[y1]
            top = above[x0] + (above[x1] - above[x0]) * (x - x0)
            bottom = below[x0] + (below[x1] - below[x0]) * (x - x0)
            expected[i, j] = top + (bottom - top) * (y - y0)
    rows = fid.interpolation(size[0])
    columns = fid.interpolation(size[1])
    resized = rows @ torch.from_numpy(image).float() @ columns.T
    assert np.abs(resized.numpy() - expected).max() < 255 * 1e-4


# ---- 2. The Frechet distance ---------------------------------------------------------------------

def test_frechet_distance_of_shifted_unit_gaussians_is_the_squared_shift():
    one = np.eye(2048)
    distance = fid.frechet_distance(np.zeros(2048), one, np.ones(2048), one)
    assert distance == pytest.approx(2048, rel=1e-12)


def test_frechet_distance_of_commuting_covariances_matches_closed_form():
    a, b = random(0).uniform(0, 2, (2, 50))
    a[:5] = 0
    b[3:9] = 0
    turn = np.linalg.qr(random(1).standard_normal((50, 50)))[0]
    mu = np.zeros(50)
    distance = fid.frechet_distance(mu, turn * a @ turn.T, mu, turn * b @ turn.T)
    expected = np.sum((a**0.5 - b**0.5) ** 2)
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_agrees_with_scipys_sqrtm():
    mu1, cov1 = statistics(gaussian(900, 200, seed=900))
    mu2, cov2 = statistics(gaussian(500, 200, seed=500))
    root = sqrtm(cov1 @ cov2).real
    scipys = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    ours = fid.frechet_distance(mu1, cov1, mu2, cov2)
    assert ours == pytest.approx(scipys, rel=1e-9)


@pytest.mark.parametrize("n, m", [(30, 40), (30, 900), (900, 30)])
def test_frechet_distance_stays_exact_where_covariances_are_singular(n, m):
    x = gaussian(n, 200, seed=0)
    y = gaussian(m, 200, seed=1)
    ours = fid.frechet_distance(*statistics(x), *statistics(y))
    assert ours == pytest.approx(frechet_of_features(x, y), rel=1e-12)


def test_frechet_distance_to_itself_is_zero_and_order_does_not_matter():
    a = statistics(gaussian(300, 80, seed=0))
    b = statistics(gaussian(60, 80, seed=1))
    assert abs(fid.frechet_distance(*b, *b)) < 1e-10 * np.trace(b[1])
    there = fid.frechet_distance(*a, *b)
    back = fid.frechet_distance(*b, *a)
    assert there == pytest.approx(back, rel=1e-12)


# ---- 3. The other metrics, against the plainest code ---------------------------------------------

def test_streamed_moments_equal_numpys_even_far_from_zero():
    x = random(0).standard_normal((1000, 20)) + 1000
    moments = fid.Moments(20)
    for part in np.split(x, [1, 64, 500]):
        moments.update(torch.from_numpy(part))
    mu, cov = moments.statistics()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), atol=1e-8)


def test_inception_score_is_the_mean_over_contiguous_splits():
    logits = torch.from_numpy(random(0).standard_normal((250, 12)) * 3)
    scores = []
    for first in (0, 100, 200):
        p = torch.softmax(logits[first:first + 100], 1).numpy()
        divergence = np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)
        scores.append(np.exp(np.mean(divergence)))
    ours = fid.inception_score(logits, split=100)
    assert ours == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_survives_certainty():
    logits = torch.eye(10).repeat(5, 1) * 2000  # every probability is 0 or 1
    assert fid.inception_score(logits) == pytest.approx(10)


def test_precision_and_recall_match_brute_force():
    real = gaussian(700, 3, seed=0)
    fake = 1.3 * gaussian(620, 3, seed=0) - 0.5

    def share(x, y):
        between = np.sqrt(((y[:, None] - y) ** 2).sum(2))
        radius = np.sort(between, axis=1)[:, 3]  # at 0 is the point itself
        covered = []
        for point in x:
            distance = np.sqrt(((point - y) ** 2).sum(1))
            covered.append((distance <= radius).any())
        return np.mean(covered)

    ours = fid.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert ours == (share(fake, real), share(real, fake))
    assert 0.1 < ours[0] < 0.9  # so that it could have gone wrong
    assert 0.1 < ours[1] < 0.9


def test_kid_matches_brute_force_over_all_pairs():
    x = gaussian(30, 5, seed=0)
    y = gaussian(41, 5, seed=1)

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    def mean_of_different(x):
        return np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])

    xx = mean_of_different(x)
    yy = mean_of_different(y)
    xy = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
    ours = fid.kid(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_kid_is_unbiased():
    pairs = torch.from_numpy(random(0).standard_normal((400, 2, 20, 4)))
    draws = [fid.kid(x, y) for x, y in pairs]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20
    assert min(draws) < 0


# ---- 4. Images and references --------------------------------------------------------------------

@pytest.mark.parametrize("compression", [0, 8, 12])  # stored, deflate, bz2
def test_npz_is_read_in_slices_in_any_order(tmp_path, compression):
    images = random_images(50)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        with archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array(member, images)
    read = fid.Images(str(tmp_path / "a.npz"))
    assert len(read) == 50
    for part in slice(40, 50), slice(0, 7), slice(7, 20), slice(None):
        np.testing.assert_array_equal(read[part], images[part])


def test_an_npz_of_many_images_is_not_loaded(tmp_path):
    black = np.zeros((10_000, 64, 64, 3), np.uint8)  # 123 MB
    np.savez_compressed(tmp_path / "a.npz", arr_0=black)
    tracemalloc.start()
    images = fid.Images(str(tmp_path / "a.npz"))
    for i in range(0, 10_000, 64):
        images[i:i + 64]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_a_folder_gives_what_the_npz_of_its_images_gives(small, tmp_path):
    images = random_images(70)
    np.savez(tmp_path / "a.npz", arr_0=images)
    save_folder(tmp_path / "folder", images)
    from_npz = small_report(fid.Images(str(tmp_path / "a.npz")), None, small)
    from_folder = small_report(fid.Images(str(tmp_path / "folder")), None, small)
    assert from_npz == from_folder


def test_a_link_to_a_folder_counts_no_image_twice(tmp_path):
    save_folder(tmp_path / "images", random_images(60))
    os.symlink(".", tmp_path / "images" / "0" / "loop")
    os.symlink(tmp_path / "images" / "1", tmp_path / "images" / "again")
    assert len(fid.Images(str(tmp_path / "images"))) == 60


def test_a_saved_reference_gives_what_its_images_give(small, tmp_path, capsys):
    real = str(tmp_path / "real.npz")
    fake = str(tmp_path / "fake.npz")
    saved = str(tmp_path / "saved.npz")
    np.savez(real, arr_0=random_images(90, seed=3))
    np.savez(fake, arr_0=random_images(80, seed=4))
    weights = str(small / "features.pt")
    assert fid.main([real, saved, "--save", "--weights", weights]) == 0
    from_images, _ = reported(capsys, fake, real, "--weights", weights)
    from_statistics, _ = reported(capsys, fake, saved, "--weights", weights)
    assert "KID" in from_images
    assert "KID" not in from_statistics  # needs images
    name = "FD(toy-classifier)"
    assert from_statistics[name] == pytest.approx(from_images[name], rel=1e-9)


@torch.no_grad()
def test_inception_reports_the_whole_protocol(inception_file, tmp_path, capsys):
    golden = np.load(INCEPTION)
    real = random_images(5, seed=1)
    np.savez(tmp_path / "fake.npz", arr_0=golden["images"])
    np.savez(tmp_path / "real.npz", arr_0=real)
    report, err = reported(capsys, tmp_path / "fake.npz", tmp_path / "real.npz",
                           "--weights", inception_file)
    pooled, spatial = inception()(torch.from_numpy(real))
    for name, fake, x in ("FID", "features", pooled), ("sFID", "spatial", spatial):
        distance = frechet_of_features(golden[fake].astype(float), x.double().numpy())
        assert report[name] == pytest.approx(distance, rel=1e-5)
    score = fid.inception_score(torch.from_numpy(golden["logits"]))
    assert report["IS"] == pytest.approx(score, rel=1e-5)
    assert report["n"] == 4
    assert report["n_reference"] == 5
    assert report["d"] == 2048
    assert "warning" in err  # these are not the published weights
    assert fid.WEIGHTS_SHA256 in err


def test_a_reference_without_sfids_statistics_is_mentioned(inception_file, tmp_path, capsys):
    reference = str(tmp_path / "reference.npz")
    np.savez(reference, mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    net = fid.load_network(inception_file)
    report = fid.evaluate(net, random_images(4), None, reference)
    assert "FID" in report
    assert "sFID" not in report
    assert "reference.npz: has no mu_s" in capsys.readouterr().err


def test_two_ranks_give_what_one_gives(small, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=random_images(101), labels=np.arange(101) % 3)
    command = [str(tmp_path / "a.npz"), str(small / "reference.npz")]
    alone, _ = reported(capsys, *command)
    first, second = two_ranks(command + ["--json"])
    together = json.loads(first[1])
    assert second == (0, "", "")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        if not isinstance(value, str):
            value = pytest.approx(value, rel=1e-4)
        assert together[name] == value


def test_real_images_give_the_floor_that_is_printed(small):
    kept = np.load(small / "reference.npz")["arr_0"]
    halves = kept[random(0).permutation(120)].reshape(2, 60, *kept.shape[1:])
    a = small_report(halves[0], np.zeros(60), small)
    b = small_report(halves[1], np.zeros(60), small)
    expected = (a["FD(toy-classifier)"] + b["FD(toy-classifier)"]) / 2
    assert a["real_against_real"] == b["real_against_real"] == pytest.approx(expected, rel=1e-5)
    assert "FID" not in a
    assert a["n"] == 60


def test_training_learns_and_leaves_a_reference(tmp_path):
    labels = np.arange(600) % 3
    images = random_images(600, seed=1) // 4
    images[np.arange(600), :, :, labels] += 60  # the class is the brightest channel
    saved = features.train_classifier(images, labels, "toy-classifier", steps=60, batch=32)
    again = features.train_classifier(images, labels, "toy-classifier", steps=60, batch=32)
    for name, weight in saved["model"].items():
        assert torch.equal(weight, again["model"][name])
    torch.save(saved, tmp_path / "features.pt")
    net = fid.load_network(str(tmp_path / "features.pt"))
    reference = str(tmp_path / "reference.npz")
    fid.save_reference(reference, net, images, arr_0=images, labels=labels)
    assert small_report(images, labels, tmp_path)["class_accuracy"] > 0.9


# ---- 5. Bad input: one line that names it, exit code 2 -------------------------------------------

@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "--jsn"], ["a", "b", "--js"]])
def test_a_wrong_command_line_is_one_line(argv, capsys):
    refused(capsys, [], *argv)


def test_help_shows_the_protocol(capsys):
    with pytest.raises(SystemExit) as end:
        fid.main(["--help"])
    assert end.value.code == 0
    assert "The protocol" in capsys.readouterr().out


def test_missing_weights_say_where_to_get_them(few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, [fid.WEIGHTS, fid.WEIGHTS_SHA256, "https://"], few, few)


class Code:
    """A pickle that runs code where it is loaded without care"""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("kind", ["truncated", "flipped bit", "code", "text", "folder"])
def test_broken_weights_are_refused_and_run_no_code(small, tmp_path, capsys, kind):
    path = tmp_path / "bad.pt"
    whole = (small / "features.pt").read_bytes()
    middle = len(whole) // 2
    contents = {
        "truncated": whole[:middle],
        "flipped bit": flip_bit(whole, middle),
        "code": pickle.dumps(Code()),
        "text": b"no weights",
    }
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents[kind])
    reference = small / "reference.npz"
    err = refused(capsys, ["bad.pt"], reference, reference, "--weights", path)
    assert "weights_only" not in err


@pytest.mark.parametrize("name, change, why", [
    ("Mixed_5c.branch_pool.conv.weight", None, "Mixed_5c.branch_pool"),
    ("fc.weight", torch.zeros(1000, 2048), "1008"),
    ("extra.conv.weight", torch.zeros(1, 1, 1, 1), "extra"),
])
def test_weights_of_another_network_are_refused(few, tmp_path, capsys, name, change, why):
    state = dict(random_inception())
    if change is None:
        del state[name]
    else:
        state[name] = change
    torch.save(state, tmp_path / "other.pth")
    refused(capsys, ["other.pth", why], few, few, "--weights", tmp_path / "other.pth")


@pytest.mark.parametrize("value, why", [
    (1e38, "features.pt: makes features that are not finite"),
    (np.nan, "body.4.1.weight holds NaN"),
])
def test_features_that_are_not_finite_give_no_score(small, few, tmp_path, capsys, value, why):
    saved = torch.load(small / "features.pt", weights_only=True)
    saved["model"]["body.4.1.weight"].fill_(value)
    saved["model"]["body.4.1.running_var"].fill_(0)
    torch.save(saved, tmp_path / "features.pt")
    refused(capsys, [why], few, few, "--weights", tmp_path / "features.pt")


@pytest.mark.parametrize("change, why", [
    ({"sha256": "0" * 64}, "0" * 64),
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "(5, 5)"),
    ({"mu": np.full(96, np.nan)}, "NaN"),
    ({"sigma": np.full((96, 96), np.nan)}, "NaN"),
    ({"mu": np.full(96, "x")}, "float"),
    ({"mu": np.full(96, None)}, "pickle"),
    ({"arr_0": np.zeros((9, 0, 4, 3), np.uint8)}, "(9, 0, 4, 3)"),
    ({"arr_0": random_images(3)}, "3 images"),
])
def test_an_unusable_reference_is_named(small, tmp_path, capsys, change, why):
    arrays = dict(np.load(small / "reference.npz"))
    del arrays["labels"]
    arrays.update(change)
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(capsys, ["bad.npz", why], small / "reference.npz", tmp_path / "bad.npz",
            "--weights", small / "features.pt")


@pytest.mark.parametrize("arrays, why", [
    ({"arr_0": random_images(9) / 1.0}, "float64"),
    ({"arr_0": random_images(9)[..., 0]}, "(9, 16, 16)"),
    ({"arr_0": random_images(3)}, "3 images"),
    ({"arr_0": np.zeros((9, 4, 0, 3), np.uint8)}, "(9, 4, 0, 3)"),
    ({"arr_0": np.asfortranarray(random_images(9))}, "Fortran"),
    ({"images": random_images(9)}, "arr_0"),
    ({"arr_0": random_images(9), "labels": np.zeros(8, int)}, "labels (8,)"),
])
def test_samples_of_another_kind_are_named(small, tmp_path, capsys, arrays, why):
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(capsys, ["bad.npz", why], tmp_path / "bad.npz", small / "reference.npz")


@pytest.mark.parametrize("kind, why", [
    ("missing", "No such file"),
    ("text", "not a zip"),
    ("truncated", "zip"),
    ("cut", "bad.npz"),
    ("flipped bit", "CRC"),
])
def test_broken_samples_are_named(small, tmp_path, capsys, kind, why):
    path = tmp_path / "bad.npz"
    np.savez(path, arr_0=random_images(9))
    whole = path.read_bytes()
    contents = {
        "text": b"not an archive",
        "truncated": whole[:2000],
        "cut": whole.replace(whole[1000:3000], b""),  # the archive's directory is there
        "flipped bit": flip_bit(whole, 3000),
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(contents[kind])
    refused(capsys, ["bad.npz", why], path, small / "reference.npz")


@pytest.mark.parametrize("kind, name, why", [
    ("empty", "bad", "0 images"),
    ("broken", "000.png", "expected an image"),
    ("size", "bad", "images of one size"),
])
def test_an_unusable_folder_of_samples_is_named(small, tmp_path, capsys, kind, name, why):
    folder = tmp_path / "bad"
    folder.mkdir()
    if kind != "empty":
        save_folder(folder, random_images(70))
    if kind == "broken":
        whole = (folder / "0" / "001.png").read_bytes()
        (folder / "0" / name).write_bytes(whole[:60])
    if kind == "size":
        Image.fromarray(random_images(1)[0, :8]).save(folder / "0" / "003.png")
    refused(capsys, [name, why], folder, small / "reference.npz")


def test_a_class_folder_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o755)
        os.mkdir(os.path.join(folder, "shut"), 0)
        user = os.geteuid()
        if user == 0:  # root may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(fid.BadInput, match="Permission denied.*shut"):
                fid.Images(folder)
        finally:
            os.seteuid(user)


def test_an_image_that_the_second_rank_cannot_read_is_named_and_both_end(small, tmp_path):
    save_folder(tmp_path / "images", random_images(70))
    (tmp_path / "images" / "1" / "069.png").write_bytes(b"no image")
    first, second = two_ranks([str(tmp_path / "images"), str(small / "reference.npz")])
    for code, out, err in first, second:
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1
    assert "another rank" in first[2]
    assert "069.png" in second[2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_full_disk_leaves_the_old_reference(small, tmp_path, capsys):
    path = tmp_path / "saved.npz"
    path.write_bytes(b"old")
    os.symlink("/dev/full", tmp_path / "saved.npz.part")
    refused(capsys, ["saved.npz: cannot be written", "No space left"],
            small / "reference.npz", path, "--save", "--weights", small / "features.pt")
    assert os.listdir(tmp_path) == ["saved.npz"]
    assert path.read_bytes() == b"old"


def test_a_missing_folder_for_the_reference_is_named_before_the_work(small, tmp_path, capsys):
    refused(capsys, ["none: no such folder"], small / "reference.npz", tmp_path / "none" / "a.npz",
            "--save", "--weights", small / "features.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="sets the size of a pipe")
def test_sigterm_while_writing_ends_with_one_line_and_leaves_nothing(small, tmp_path):
    # A pipe of 4 kB in place of the .part file holds fid.py up while it writes.
    path = str(tmp_path / "saved.npz")
    os.mkfifo(path + ".part")
    pipe = os.open(path + ".part", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    process = start([str(small / "reference.npz"), path, "--save",
                     "--weights", str(small / "features.pt")])
    select.select([pipe], [], [], 60)  # until it writes
    process.send_signal(signal.SIGTERM)
    os.set_blocking(pipe, True)
    while os.read(pipe, 65536):
        pass
    os.close(pipe)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "fid.py: stopped\n"
    assert os.listdir(tmp_path) == []


def test_training_wants_labels(few, tmp_path, capsys):
    assert features.main([str(few), str(few), str(tmp_path)]) == 2
    assert "labels" in capsys.readouterr().err
    assert not (tmp_path / "features.pt").exists()
    assert features.main(["missing.npz", "missing.npz", str(tmp_path)]) == 2
    assert "missing.npz" in capsys.readouterr().err
