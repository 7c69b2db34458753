"""What fid.py claims, as tests: python -m pytest test_fid.py"""

import functools
import json
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import HERE, full_disk, refuses, start, write_pickle_with_code
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import map_coordinates

import fid
from data.fashion import features

# Images, and what torch-fidelity 0.4.0's FeatureExtractorInceptionV3 makes of them with the weights
# of random_inception(): its outputs "2048" and "logits_unbiased", and the first 7 channels of
# Mixed_6d.branch1x1 as NHWC. `names` and `shapes` are those of its state dict.
INCEPTION = HERE / "data" / "golden" / "inception_random.npz"
FD = "FD(données)"


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


def random_images(n, seed=0, size=32):
    """Blotches, so that features differ from image to image"""
    coarse = random(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def save_npz(path, images, **arrays):
    np.savez(path, arr_0=images, **arrays)
    return str(path)


def save_folder(folder, images):
    """PNG files, 50 in each class folder"""
    for i, image in enumerate(images):
        path = folder / str(i // 50) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder: samples.npz and real.npz, random images, and the features.pt of a random network"""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    net = fid.Classifier("données", 3)
    torch.save({"model": net.state_dict(), "name": "données"}, folder / "features.pt")
    torch.save(random_inception(), folder / "inception.pth")
    save_npz(folder / "samples.npz", random_images(70), labels=np.arange(70) % 3)
    save_npz(folder / "real.npz", random_images(120, seed=2))
    return folder


def gaussian(n, d, seed):
    """n draws of d correlated features"""
    rng = random(seed)
    x = rng.standard_normal((n, d))
    mixing = rng.standard_normal((d, d))
    return x @ mixing + rng.standard_normal(d)


def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def frechet_of_features(x, y):
    """Without covariances: the root's trace is the nuclear norm of the product of the features"""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
    traces = np.sum(a**2) + np.sum(b**2)
    return shift + traces - 2 * np.linalg.norm(a @ b.T, "nuc")


def run(*arguments):
    fid.main([str(argument) for argument in arguments])


def reported(capsys, *arguments):
    """-> the report on stdout, what is on stderr"""
    run(*arguments, "--json")
    out, err = capsys.readouterr()
    return json.loads(out), err


# ---- 1. Inception --------------------------------------------------------------------------------

@torch.no_grad()
def test_inception_gives_the_numbers_of_torch_fidelity(small):
    golden = np.load(INCEPTION)
    assert sum(weight.numel() for weight in inception().parameters()) == 23_850_960
    for net in inception(), fid.load_network(str(small / "inception.pth")):  # the second is folded
        pooled, spatial = net(torch.from_numpy(golden["images"]))
        ours = {"features": pooled, "spatial": spatial, "logits": net.logits(pooled)}
        for name, values in ours.items():
            assert values.shape == golden[name].shape
            difference = np.abs(values.numpy() - golden[name]).max()
            assert difference < 1e-5 * np.abs(golden[name]).max()


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (32, 32), (299, 299), (300, 512)])
def test_resize_is_that_of_tensorflow_1(size):
    image = random(0).integers(0, 256, size).astype(np.float64)
    y = np.arange(299) * size[0] / 299
    x = np.arange(299) * size[1] / 299
    places = np.meshgrid(y, x, indexing="ij")
    expected = map_coordinates(image, places, order=1, mode="nearest")  # bilinear
    rows = fid.interpolation(size[0])
    columns = fid.interpolation(size[1])
    resized = rows @ torch.from_numpy(image).float() @ columns.T
    assert np.abs(resized.numpy() - expected).max() < 255 * 1e-4


# ---- 2. The Frechet distance ---------------------------------------------------------------------

def test_frechet_distance_of_commuting_covariances_matches_closed_form():
    a, b = random(0).uniform(0, 2, (2, 50))
    a[:5] = 0
    b[3:9] = 0
    turn = np.linalg.qr(random(1).standard_normal((50, 50)))[0]
    distance = fid.frechet_distance(np.zeros(50), turn * a @ turn.T,
                                    np.ones(50), turn * b @ turn.T)
    expected = 50 + np.sum((a**0.5 - b**0.5) ** 2)
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_agrees_with_scipys_sqrtm():
    mu1, cov1 = statistics(gaussian(900, 200, seed=900))
    mu2, cov2 = statistics(gaussian(500, 200, seed=500))
    root = sqrtm(cov1 @ cov2).real
    scipys = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    ours = fid.frechet_distance(mu1, cov1, mu2, cov2)
    assert ours == pytest.approx(scipys, rel=1e-9)


@pytest.mark.parametrize("n, m", [(30, 40), (30, 900), (900, 30)])
def test_frechet_distance_is_exact_for_rank_deficient_covariances(n, m):
    x = gaussian(n, 200, seed=0)
    y = gaussian(m, 200, seed=1)
    ours = fid.frechet_distance(*statistics(x), *statistics(y))
    assert ours == pytest.approx(frechet_of_features(x, y), rel=1e-12)


# ---- 3. The other metrics, against the plainest code ---------------------------------------------

def test_streamed_moments_equal_numpys_far_from_zero():
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


def test_precision_and_recall_match_brute_force():
    real = gaussian(700, 3, seed=0)
    fake = 1.3 * gaussian(620, 3, seed=0) - 0.5

    def share(x, y):
        between = np.sqrt(((y[:, None] - y) ** 2).sum(2))
        radius = np.sort(between, axis=1)[:, 3]  # at 0 is the point itself
        distances = np.sqrt(((x[:, None] - y) ** 2).sum(2))
        return np.mean((distances <= radius).any(1))

    ours = fid.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert ours == (share(fake, real), share(real, fake))
    assert 0.1 < ours[0] < 0.9  # so that it could have gone wrong
    assert 0.1 < ours[1] < 0.9


# ---- 4. Images -----------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    grays = np.arange(4000, dtype=np.uint16).astype(np.uint8)
    images = np.broadcast_to(grays[:, None, None, None], (4000, 64, 64, 3))  # 49 MB
    save(tmp_path / "a.npz", arr_0=images)
    tracemalloc.start()
    n = 0
    for image in fid.read_images(str(tmp_path / "a.npz")):
        assert np.array_equal(image, images[n])
        n += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 4000
    assert peak < 5_000_000


def test_folder_scores_like_the_npz_of_its_images(small, tmp_path, capsys):
    save_folder(tmp_path / "folder", random_images(70))
    from_npz, _ = reported(capsys, small / "samples.npz", small / "real.npz")
    from_folder, _ = reported(capsys, tmp_path / "folder", small / "real.npz")
    assert from_npz.pop("class_accuracy") >= 0
    assert from_npz == from_folder


def test_every_file_counts_unless_hidden(tmp_path):
    images = []
    for mode, name in ("1", "a.bmp"), ("L", "b.webp"), ("P", "c.GIF"), ("RGB", "d"):
        image = Image.fromarray(random_images(1)[0]).convert(mode)
        image.save(tmp_path / name, "png")
        images.append(np.array(image.convert("RGB")))
    (tmp_path / "._a.bmp").write_bytes(b"a Mac's")
    save_folder(tmp_path / ".checkpoints", random_images(8))
    assert np.array_equal(list(fid.read_images(str(tmp_path))), images)


def test_class_folder_may_be_a_link_but_not_a_folder_below(tmp_path):
    save_folder(tmp_path / "images", random_images(60))
    save_folder(tmp_path / "elsewhere", random_images(20))
    os.symlink(tmp_path / "elsewhere" / "0", tmp_path / "images" / "linked")
    assert len(list(fid.read_images(str(tmp_path / "images")))) == 80
    os.symlink("..", tmp_path / "images" / "0" / "loop")
    with pytest.raises(fid.BadInput, match="loop: a link"):
        list(fid.read_images(str(tmp_path / "images")))


# ---- 5. Scores -----------------------------------------------------------------------------------

def test_saved_statistics_score_like_their_images(small, tmp_path, capsys):
    saved = tmp_path / "saved.npz"
    weights = ["--weights", small / "features.pt"]
    run(small / "real.npz", saved, "--save", *weights)
    from_images, _ = reported(capsys, small / "samples.npz", small / "real.npz")
    from_statistics, _ = reported(capsys, small / "samples.npz", saved, *weights)
    assert from_statistics[FD] == from_images[FD]
    assert "precision" in from_images
    assert "precision" not in from_statistics  # needs images
    assert os.listdir(tmp_path) == ["saved.npz"]


@torch.no_grad()
def test_inception_reports_the_whole_protocol(small, tmp_path, capsys):
    golden = np.load(INCEPTION)
    real = random_images(5, seed=1)
    samples = save_npz(tmp_path / "samples.npz", golden["images"])
    reference = save_npz(tmp_path / "real.npz", real)
    weights = small / "inception.pth"
    report, err = reported(capsys, samples, reference, "--weights", weights)
    pooled, spatial = inception()(torch.from_numpy(real))
    for name, fake, x in ("FID", "features", pooled), ("sFID", "spatial", spatial):
        distance = frechet_of_features(golden[fake].astype(float), x.double().numpy())
        assert report[name] == pytest.approx(distance, rel=1e-5)
    score = fid.inception_score(torch.from_numpy(golden["logits"]))
    assert report["IS"] == pytest.approx(score, rel=1e-5)
    assert report["n"] == 4
    assert "warning" in err  # these are not the published weights


def test_real_against_real_is_what_draws_of_real_images_score(small, tmp_path):
    net = fid.load_network(str(small / "features.pt"))
    kept = random_images(120, seed=2)
    reference = str(tmp_path / "reference.npz")
    everything = save_npz(tmp_path / "all.npz", random_images(300))
    fid.save_reference(reference, net, everything, arr_0=kept)
    distances = []
    for rows in random(0).permutation(120).reshape(2, 60):
        report = fid.evaluate(net, save_npz(tmp_path / "half.npz", kept[rows]), reference)
        distances.append(report[FD])
    assert report["real_against_real"] == pytest.approx(np.mean(distances), rel=1e-5)


@pytest.mark.parametrize("name", ["labels", "arr_1"])  # arr_1 in what ADM's sampler saves
def test_class_accuracy_is_the_share_of_labels_that_the_network_finds(small, tmp_path, name):
    net = fid.load_network(str(small / "features.pt"))
    images = random_images(70)
    with torch.no_grad():
        labels = net.logits(net(torch.from_numpy(images))[0]).argmax(1).numpy()
    labels[:7] += 1
    samples = save_npz(tmp_path / "a.npz", images, **{name: labels})
    assert fid.evaluate(net, samples, str(small / "real.npz"))["class_accuracy"] == 0.9


def test_left_over_rank_and_ascii_terminal_do_not_lose_the_scores(small):
    process = start("fid.py", small / "samples.npz", small / "real.npz",
                    RANK="1", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert r"FD(donn\xe9es)" in out
    assert process.returncode == 0, err


def test_small_classifier_learns_and_leaves_a_reference(tmp_path, monkeypatch):
    labels = np.arange(300) % 3
    images = random_images(300, seed=1, size=16) // 4
    images[np.arange(300), :, :, labels] += 60  # the class is the brightest channel
    train = functools.partial(features.train_classifier, steps=60, batch=32)
    monkeypatch.setattr(features, "train_classifier", train)
    path = save_npz(tmp_path / "train.npz", images, labels=labels)
    features.main([path, path, str(tmp_path)])
    net = fid.load_network(str(tmp_path / "features.pt"))
    assert fid.evaluate(net, path, str(tmp_path / "reference.npz"))["class_accuracy"] > 0.9
    refuses(features.main, [path, path, tmp_path], "features.pt", "exists")


# ---- 6. Bad input --------------------------------------------------------------------------------

def test_missing_weights_are_named_with_their_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(fid.main, ["samples.npz", "reference.npz"], fid.WEIGHTS, "https://")


def test_weights_with_code_are_refused_and_the_code_never_runs(small, tmp_path):
    path = write_pickle_with_code(tmp_path / "bad.pt", tmp_path / "marker")
    refuses(fid.main, [small / "samples.npz", small / "real.npz", "--weights", path], "bad.pt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind, why", [
    ("text", "bad.pt: Unsupported operand"),
    ("cut", "bad.pt: PytorchStreamReader failed reading zip archive"),
    ("torchvision", "shape torch.Size([1000, 2048]) from checkpoint"),
    ("NaN", "not finite"),
])
def test_unusable_weights_are_refused_with_the_reason(small, tmp_path, kind, why):
    path = tmp_path / "bad.pt"
    saved = torch.load(small / "features.pt", weights_only=True)
    saved["model"]["body.4.1.weight"].fill_(np.nan)
    if kind == "torchvision":
        saved = dict(random_inception())
        saved["fc.weight"] = torch.zeros(1000, 2048)
    torch.save(saved, path)
    if kind == "text":
        path.write_bytes(b"no weights")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:200_000])
    refuses(fid.main, [small / "samples.npz", small / "real.npz", "--weights", path], why)


@pytest.mark.parametrize("arrays, why", [
    ({"sha256": "0" * 64, "mu": np.zeros(96), "sigma": np.eye(96)}, "0" * 64),
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "(5, 5)"),
    ({"images": random_images(9)}, "arr_0"),
    ({"arr_0": random_images(9)[..., 0] / 1.0}, "float64 (9, 32, 32)"),
    ({"arr_0": np.asfortranarray(random_images(9))}, "Fortran"),
    ({"arr_0": random_images(3)}, "3 images"),
    ({"arr_0": random_images(9), "arr_1": random_images(9)}, "arr_1 is (9, 32, 32, 3)"),
    ({"arr_0": random_images(9), "labels": np.zeros(8, int)}, "labels is (8,)"),
    ({"arr_0": random_images(9, size=64)}, "(64, 64) pixels"),
])
def test_unusable_npz_is_named(small, tmp_path, arrays, why):
    np.savez(tmp_path / "bad.npz", **arrays)
    refuses(fid.main, [small / "samples.npz", tmp_path / "bad.npz",
                       "--weights", small / "features.pt"], "bad.npz", why)


def test_damaged_npz_is_named(small, tmp_path):
    path = tmp_path / "bad.npz"
    whole = (small / "samples.npz").read_bytes()
    flipped = whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:]
    for contents in b"not an archive", whole[:5000], whole[:1000] + whole[3000:], flipped:
        path.write_bytes(contents)
        refuses(fid.main, [path, small / "real.npz"], path)


@pytest.mark.parametrize("image, words", [
    (None, ["identify"]),
    (Image.new("RGBA", (32, 32)), ["mode RGBA"]),
    (Image.new("I;16", (32, 32)), ["mode I;16"]),
    (Image.new("RGB", (32, 8)), ["(32, 8)", "000.png", "(32, 32)"]),
])
def test_unusable_image_is_named(small, tmp_path, image, words):
    save_folder(tmp_path, random_images(70))
    if image is None:
        (tmp_path / "bad.png").write_bytes(b"no image")
    else:
        image.save(tmp_path / "bad.png")
    refuses(fid.main, [tmp_path, small / "real.npz"], "bad.png", *words)


def test_output_that_cannot_be_written_is_found_before_the_work(small, tmp_path):
    old = tmp_path / "old.npz"
    old.write_bytes(b"no images to work on")
    flags = ["--weights", small / "features.pt", "--save"]
    for name, why in ("old.npz", "exists"), ("", "exists"), ("none/a.npz", "No such file"):
        refuses(fid.main, [old, tmp_path / name] + flags, tmp_path / name, why)
    refuses(fid.main, [old, tmp_path / "new.npz"] + flags, old)  # this one could be written
    assert old.read_bytes() == b"no images to work on"
    assert os.listdir(tmp_path) == ["old.npz"]


def test_full_disk_or_kill_while_saving_does_not_block_the_next_try(small, tmp_path):
    saved = tmp_path / "saved.npz"
    command = [small / "real.npz", saved, "--save", "--weights", small / "features.pt"]
    with full_disk(limit=20_000):
        refuses(fid.main, command, f"{saved}: ")
    code = ("import os, fid\n"
            "def write_some(file, **arrays):\n"
            "    file.write(b'some')\n"
            f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
            "fid.np.savez_compressed = write_some\n"
            "fid.main()\n")
    killed = start("-c", code, *command)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not saved.exists()
    run(*command)
    assert saved.exists()
