"""What tokenizer.py claims, as tests: python -m pytest test_tokenizer.py"""

import functools
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import npp
import tokenizer
from data.imagenet import pack
from tokenizer import BadInput, from_uint8, to_uint8

HERE = os.path.dirname(os.path.abspath(__file__))
FASHION = os.path.join(HERE, "data", "fashion")
FACES = os.path.join(HERE, "data", "faces")
# What LlamaGen's VQModel makes of images, with the weights of random_vq(): data/golden/README.md
VQ = os.path.join(HERE, "data", "golden", "vq_random.npz")
SMALL = {"codebook_size": 32, "ch": 32, "ch_mult": (1, 1, 1), "z_channels": 32}


# ---- Helpers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_images(n, seed=0, size=16):
    """Blotches, so that features differ from image to image"""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def class_folder(folder, images, names="ab"):
    """Images as PNG files in class folders, as many in each"""
    for i, image in enumerate(images):
        name = names[i * len(names) // len(images)]
        path = folder / name / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(folder)


def image_file(path, n=40, seed=0, size=16, classes=3):
    """Random images as an .npz, in which the classes come in turn"""
    labels = (np.arange(n) + seed) % classes
    np.savez(path, arr_0=random_images(n, seed, size), labels=labels)
    return str(path)


def random_tokenizer(path, seed):
    torch.manual_seed(seed)
    tokenizer.save_tokenizer(str(path), tokenizer.VQModel(**SMALL))
    return str(path)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    """A file of a random VQModel that tells images apart: 32 codes, 4 pixels each"""
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small.pt", seed=0)


@pytest.fixture
def other_tokenizer(tmp_path):
    return random_tokenizer(tmp_path / "other.pt", seed=1)


def flags(**values):
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def training(images, out, image_size=4, steps=200, batch=2, **values):
    """The command line of a short training"""
    return ["train", str(images), str(out)] + flags(
        image_size=image_size, steps=steps, batch=batch, ch_mult=1, codebook_size=16, **values)


def encoding(images, out, path, image_size=16, **values):
    """The command line of an encoding by the tokenizer at `path`"""
    return ["encode", str(images), str(out)] + flags(
        tokenizer=path, image_size=image_size, **values)


def encode(images, out, path, code=0, **values):
    assert tokenizer.main(encoding(images, out, path, **values)) == code


def refuses(capsys, arguments, *words, main=tokenizer.main):
    """Bad input gives exit code 2, and one line on stderr that has these words"""
    capsys.readouterr()
    assert main([str(x) for x in arguments]) == 2
    _, message = capsys.readouterr()
    assert message.count("\n") == 1, message
    for word in words:
        assert word in message, message


def ignore_hangup():  # as nohup does
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def program(arguments, first=None, **environment):
    """tokenizer.py in a process of its own, which calls `first` before it starts"""
    command = [sys.executable, os.path.join(HERE, "tokenizer.py")] + arguments
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=dict(os.environ, **environment), preexec_fn=first)


def two_ranks(arguments):
    """The two processes of a command, as torchrun starts them"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        ranks.append(program(arguments, RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0",
                             LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    return ranks


def wait_for(path, process):
    """Until the process has made the file"""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@contextmanager
def full_disk(limit):
    """Within, no file can grow beyond so many bytes"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder):
    """-> {name: bytes} of every file below a folder"""
    contents = {}
    for path in Path(folder).rglob("*"):
        if path.is_file():
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


def psnr(images, again, margin=0):
    inside = slice(margin, images.shape[1] - margin)
    difference = images[:, inside, inside].astype(float) - again[:, inside, inside]
    return 10 * np.log10(255**2 / np.square(difference).mean())


class Evil:
    """A pickle that runs code where it is loaded without care"""

    def __reduce__(self):
        return os.system, ("touch hacked",)


# ---- 1. Files


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "folder" / "x.pt")
    tokenizer.replace_file(path, partial(torch.save, {"x": 1}))
    before = files(tmp_path)
    many = [torch.zeros(1000) for _ in range(200)]

    def write_bytes(file):
        file.write(bytes(10**6))

    writers = [partial(torch.save, torch.zeros(10**6)), partial(torch.save, many), write_bytes]
    with full_disk(100_000):
        for write in writers:
            with pytest.raises(BadInput, match=r"x\.pt: cannot be written \(File too large\)"):
                tokenizer.replace_file(path, write)
            assert files(tmp_path) == before


def test_an_error_and_ctrl_c_leave_the_old_file(tmp_path):
    path = str(tmp_path / "folder" / "x.pt")
    tokenizer.replace_file(path, partial(torch.save, {"x": 1}))
    before = files(tmp_path)

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    def broken(file):
        raise ValueError("a bug is no bad input")

    with pytest.raises(KeyboardInterrupt):
        tokenizer.replace_file(path, interrupted)
    assert files(tmp_path) == before
    with pytest.raises(ValueError):
        tokenizer.replace_file(path, broken)
    assert files(tmp_path) == before


def test_pixels_survive_the_way_to_the_model_and_back():
    images = random_images(3)
    assert np.array_equal(to_uint8(from_uint8(images)), images)
    extremes = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    assert to_uint8(extremes)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


# ---- 2. The model


def test_vq16_has_the_published_names_and_size():
    model = tokenizer.VQModel()
    assert sum(weight.numel() for weight in model.parameters()) == 71_883_403
    assert model.factor == 16
    published = {
        "encoder.conv_blocks.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.conv_blocks.3.upsample.conv.bias": (128,),
        "decoder.mid.1.norm.weight": (512,),
        "quantize.embedding.weight": (16384, 8),
    }
    state = model.state_dict()
    for name, shape in published.items():
        assert state[name].shape == shape


@functools.cache
def random_vq(name):
    """A state dict in the official layout with seeded weights that keep the activations near 1"""
    with np.load(VQ) as golden:
        names = golden[f"{name}_names"].tolist()
        shapes = golden[f"{name}_shapes"]
    state = {}
    for i, (key, shape) in enumerate(zip(names, shapes)):
        x = np.random.default_rng((0, i)).standard_normal(shape[shape > 0], dtype=np.float32)
        if x.ndim == 4:
            x = x * np.float32(np.prod(x.shape[1:]) ** -0.5)
        elif "norm" in key and key.endswith("weight"):
            x = 1 + 0.1 * x
        elif not key.startswith("quantize"):
            x = 0.1 * x
        state[key] = torch.from_numpy(x)
    return state


@pytest.mark.parametrize("name, factor, sizes", [("vq16", 16, (64, 96)), ("vq8", 8, (64,))])
def test_published_tokenizers_give_the_official_codes_and_images(tmp_path, name, factor, sizes):
    path = str(tmp_path / "official.pt")
    torch.save({"model": random_vq(name)}, path)
    model = tokenizer.load_tokenizer(path)
    os.remove(path)  # 0.3 GB
    golden = np.load(VQ)
    names = set(model.state_dict())
    names.add("quantize.codebook_used")  # of the training alone
    assert names == set(golden[f"{name}_names"])
    assert model.factor == factor
    for size in sizes:
        codes = model.encode(from_uint8(random_images(2, seed=1, size=size)))
        assert np.array_equal(codes.numpy(), golden[f"{name}_codes_{size}"])
        images = model.decode(codes)
        assert images.shape == (2, 3, size, size)
        official = torch.from_numpy(golden[f"{name}_images_{size}"])
        difference = images[..., ::3, ::3] - official
        assert difference.abs().max() / official.abs().max() < 1e-5


# Fashion: the PSNR is that of the 28 x 28 original pixels. Faces: the ten styles come in turn, so
# every 20th image would be of one style.
@pytest.mark.parametrize("folder, margin, floor", [(FASHION, 2, 24.5), (FACES, 0, 26.8)])
def test_embedded_images_survive_their_codes(folder, margin, floor):
    model = tokenizer.load_tokenizer(os.path.join(folder, "tokenizer.pt"))
    with np.load(os.path.join(folder, "reference.npz")) as reference:
        images = reference["arr_0"][::39]
        labels = reference["labels"]
    assert np.array_equal(labels, np.load(os.path.join(folder, "labels_val.npy")))
    codes = np.load(os.path.join(folder, "codes_val.npy"))[::39, 0]
    again = model.encode(from_uint8(images)).flatten(1).numpy()
    assert (again == codes).mean() > 0.999  # rounding may differ between machines
    shown = to_uint8(model.decode(torch.from_numpy(codes).long().view(-1, 8, 8)))
    assert psnr(images, shown, margin) > floor
    assert len(np.unique(np.load(os.path.join(folder, "codes.npy")))) == 256


# ---- 3. Images


def save_and_read(folder, picture, format="PNG", **options):
    """A picture of 16 x 16 pixels in a file -> its pixels as tokenizer.py reads them"""
    path = folder / "a" / "deeper" / "x"
    path.parent.mkdir(parents=True)
    picture.save(path, format, **options)
    item = tokenizer.Images(str(folder), [16])[0]
    assert len(item) == 1
    assert item[0].dtype == np.uint8
    assert item[0].shape == (16, 16, 3)
    return item[0].astype(int)


@pytest.mark.parametrize("kind", ["webp", "jpeg", "cmyk"])
def test_colours_of_every_kind_of_file_are_kept(tmp_path, kind):
    colour = random_images(1, seed=5)[0]
    picture = Image.fromarray(colour)
    if kind == "webp":
        pixels = save_and_read(tmp_path, picture, "WEBP", lossless=True)
        assert np.array_equal(pixels, colour)
    else:
        if kind == "cmyk":
            picture = picture.convert("CMYK")
        pixels = save_and_read(tmp_path, picture, "JPEG", quality=100, subsampling=0)
        assert np.abs(pixels - colour).max() <= 5


@pytest.mark.parametrize("kind", ["gray", "palette", "16-bit", "16-bit I", "1-bit"])
def test_gray_of_every_kind_becomes_three_equal_channels(tmp_path, kind):
    gray = random_images(1, seed=5)[0, :, :, 0]
    pictures = {
        "gray": Image.fromarray(gray),
        "palette": Image.fromarray(gray).convert("P"),
        "16-bit": Image.fromarray(gray.astype(np.uint16) * 257),
        "16-bit I": Image.fromarray(gray.astype(np.int32) * 257),
        "1-bit": Image.fromarray(gray > 127),
    }
    expected = gray
    if kind == "1-bit":
        expected = np.where(gray > 127, 255, 0)
    format = "TIFF" if kind == "16-bit I" else "PNG"
    pixels = save_and_read(tmp_path, pictures[kind], format)
    for channel in range(3):
        assert np.array_equal(pixels[:, :, channel], expected)


@pytest.mark.parametrize("channels", [3, 1], ids=["alpha", "gray alpha"])
def test_what_an_alpha_channel_hides_becomes_white(tmp_path, channels):
    colour = random_images(1, seed=5)[0, :, :, :channels]
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, 8:] = 0
    pixels = save_and_read(tmp_path, Image.fromarray(np.dstack([colour, alpha])))
    assert (pixels[:, :8] == colour[:, :8]).all()
    assert (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize("kind", ["palette alpha", "keyed"])
def test_the_colour_that_a_file_calls_transparent_becomes_white(tmp_path, kind):
    colour = random_images(1, seed=5)[0]
    picture = Image.fromarray(colour)
    transparency = tuple(colour[0, 0].tolist())
    if kind == "palette alpha":
        gray = colour[:, :, 0]
        colour = np.stack([gray, gray, gray], axis=-1)
        picture = Image.fromarray(gray).convert("P")
        transparency = int(gray[0, 0])
    transparent = (colour == colour[0, 0]).all(axis=-1)
    pixels = save_and_read(tmp_path, picture, transparency=transparency)
    assert (pixels[transparent] == 255).all()
    assert np.array_equal(pixels[~transparent], colour[~transparent])


def test_class_folders_are_read_in_the_order_of_imagefolder(tmp_path, capsys):
    for name in ("b/2.png", "b/10.png", "a/z/1.png", "a/y/3.png", "a/1.png", "a/.hidden",
                 "top.txt", "a/.git/4.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "c").mkdir()
    data = tokenizer.Images(str(tmp_path), [8])
    assert data.items == ["a/1.png", "a/y/3.png", "a/z/1.png", "b/10.png", "b/2.png"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.classes == ["a", "b", "c"]
    assert "top.txt" in capsys.readouterr().err


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    images = class_folder(tmp_path / "images", random_images(4))
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(random_images(1)[0]).save(tmp_path / "elsewhere" / "x.png")
    os.symlink(".", os.path.join(images, "a", "loop"))
    os.symlink("..", os.path.join(images, "a", "up"))
    os.symlink("../../elsewhere", os.path.join(images, "a", "z"))
    os.symlink(".", os.path.join(images, "c"))
    data = tokenizer.Images(images, [8])
    assert data.items == ["a/000.png", "a/001.png", "a/z/x.png", "b/002.png", "b/003.png"]


# ---- 4. Pictures, and .npz of samples


def test_a_picture_has_a_class_a_row(tmp_path):
    images = random_images(6, size=32)
    path = str(tmp_path / "x.png")
    tokenizer.save_images(path, iter([images[:4], images[4:]]), [7, 2, 7, 7, 2, 5])
    sheet = np.asarray(Image.open(path))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (3 * 33 - 1, 3 * 33 - 1, 3)
    expected = [[0, 2, 3], [1, 4, None], [5, None, None]]
    for row in range(3):
        for column in range(3):
            cell = sheet[row * 33 : row * 33 + 32, column * 33 : column * 33 + 32]
            i = expected[row][column]
            if i is None:
                assert (cell == 255).all()
            else:
                assert np.array_equal(cell, images[i])
    assert (sheet[32] == 255).all()
    assert (sheet[:, 65] == 255).all()


def test_samples_are_streamed_into_an_npz(tmp_path):
    images = random_images(5)
    path = str(tmp_path / "x.npz")
    sizes = []

    def chunks():
        for part in (images[:2], images[2:]):
            sizes.append(os.path.getsize(path + ".part"))  # the file is there before the images
            yield part

    tokenizer.save_images(path, chunks(), torch.tensor([3, 1, 2, 0, 70000]))
    with np.load(path) as saved:
        assert saved.files == ["arr_0", "labels"]
        assert np.array_equal(saved["arr_0"], images)
        assert saved["labels"].tolist() == [3, 1, 2, 0, 70000]
        assert saved["labels"].dtype == np.int64
    assert len(sizes) == 2


def test_nothing_is_left_of_samples_that_fail(tmp_path):
    def chunks():
        yield random_images(2)
        raise BadInput("no more")

    errors = {"x.png": "no more", "x.npz": "no more", "x.jpg": "expected a .png"}
    for name, error in errors.items():
        with pytest.raises(BadInput, match=error):
            tokenizer.save_images(str(tmp_path / name), chunks(), [0, 1, 2])
    assert not os.listdir(tmp_path)


# ---- 5. Training a small one


def test_a_killed_training_leaves_nothing(tmp_path):
    images = image_file(tmp_path / "x.npz", size=4)
    command = training(images, tmp_path / "t.pt", steps=10**6, batch=1)
    process = program(command, first=ignore_hangup)
    assert process.stdout.readline().startswith("step 100 of 1,000,000  PSNR ")
    process.send_signal(signal.SIGHUP)  # which nohup has made it ignore
    assert process.stdout.readline().startswith("step 200 of 1,000,000  PSNR ")
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_loss_that_is_no_number_leaves_the_good_file(tmp_path, capsys):
    images = image_file(tmp_path / "x.npz", size=4)
    (tmp_path / "t.pt").write_bytes(b"good")
    refuses(capsys, training(images, tmp_path / "t.pt", lr=1e5), "lr is 100000", "loss is nan")
    assert set(os.listdir(tmp_path)) == {"x.npz", "t.pt"}
    assert (tmp_path / "t.pt").read_bytes() == b"good"


# ---- 6. A data set


def run_and_kill(command, fatal):
    """Run tokenizer.py in a child that is killed at its n-th change of the disk, n = `fatal`

    -> how the child ended, 0 for well.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    changes = 0

    def deadly(change):
        def change_or_die(*arguments, **named):
            nonlocal changes
            changes += 1
            if changes == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **named)

        return change_or_die

    for name in ("replace", "remove", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    os._exit(tokenizer.main(command))


def kill_at_every_change(old, new, out, *command):
    """The command turns the folder `old` into `new`. Kill it at its first change, at its second..

    In a process of its own: a child of the tests would inherit what their threads had locked.
    """
    old_files = files(old)
    new_files = files(new)
    train_files = {name: content for name, content in old_files.items() if "_val" not in name}
    for fatal in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        died = run_and_kill(command, fatal) != 0

        # What is left is one of the two, or the old one without its val split, or no data set.
        try:
            npp.Codes(out)
            left = {name: content for name, content in files(out).items() if "/" not in name}
            if "codes_val.npy" not in left:  # then there is no val split, and these do not count
                left.pop("labels_val.npy", None)
            assert left in (old_files, train_files, new_files), (fatal, left.keys())
        except BadInput:
            assert died, fatal

        # The same command goes on to the end.
        if died:
            assert run_and_kill(command, fatal=None) == 0
        assert files(out) == new_files, fatal
        assert len(os.listdir(out)) == len(new_files), fatal
        if not died:
            print(fatal - 1)
            return


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_kill_leaves_a_mix_of_two_encodings(tmp_path, small_tokenizer, other_tokenizer, split):
    old = image_file(tmp_path / "old.npz", n=4, seed=6)
    new = image_file(tmp_path / "new.npz", n=4, seed=7)
    before = tmp_path / "before"
    after = tmp_path / "after"
    if split == "train":  # other codes, so that the old val split must go
        encode(old, before, other_tokenizer)
        encode(old, before, other_tokenizer, split="val")
        encode(new, after, small_tokenizer)
    else:
        encode(old, before, small_tokenizer)
        encode(old, before, small_tokenizer, split="val")
        encode(old, after, small_tokenizer)
        encode(new, after, small_tokenizer, split="val")
    out = tmp_path / "out"
    code = "import sys, test_tokenizer; test_tokenizer.kill_at_every_change(*sys.argv[1:])"
    command = [sys.executable, "-c", code, before, after, out]
    command += encoding(new, out, small_tokenizer, split=split)
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 9  # so many kills were survived


def test_a_full_disk_leaves_the_old_data_set_and_what_is_encoded(
        tmp_path, small_tokenizer, other_tokenizer, capsys):
    images = image_file(tmp_path / "x.npz", n=80)
    out = tmp_path / "data"
    encode(images, out, small_tokenizer)
    encode(images, out, small_tokenizer, split="val")
    before = files(out)
    with full_disk(os.path.getsize(other_tokenizer) // 2):  # the codes fit, the tokenizer does not
        refuses(capsys, encoding(images, out, other_tokenizer), "tokenizer.pt: cannot be written")
    after = files(out)
    for name, content in before.items():
        assert after.pop(name) == content
    parts = {"codes.part/000000000.npz", "codes.part/000000064.npz"}
    assert set(after) == parts | {"codes.part/plan.json"}
    encode(images, out, other_tokenizer)
    assert set(files(out)) == {"codes.npy", "labels.npy", "meta.json", "tokenizer.pt"}


def test_memory_does_not_grow_with_the_codes_of_an_encoding(tmp_path):
    codes = (np.ones((800, 10, 256), np.uint16) for _ in range(25))
    labels = np.zeros(20_000)
    meta = dict.fromkeys(tokenizer.SHARED)
    tracemalloc.start()  # it knows the memory of arrays too
    tokenizer.publish(str(tmp_path / "data"), "train", meta, codes, labels, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # bytes, where the codes are 102 MB
    saved = np.load(tmp_path / "data" / "codes.npy", mmap_mode="r")
    assert saved.shape == (20_000, 10, 256)


# ---- 7. Images to codes


@pytest.mark.parametrize("size, scale", [(16, 1.1), (20, 1.25), (16, 1.5)])
def test_ten_crops_are_those_of_torchvision(size, scale):
    image = Image.fromarray(random_images(1, seed=2, size=64)[0])
    whole = from_uint8(np.stack([tokenizer.center_crop(image, int(size * scale))]))
    end = whole.shape[-1] - size
    middle = int(round(end / 2))
    expected = []
    for x in (whole, whole.flip(-1)):
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
            expected.append(x[..., top : top + size, left : left + size])
    views = tokenizer.crops(whole, size, "ten_crop")
    assert len(views) == len(expected)
    for view, right in zip(views, expected):
        assert torch.equal(view, right)


def test_views_of_two_scales_are_encoded_one_after_the_other(tmp_path, small_tokenizer):
    images = random_images(3, seed=3, size=64)
    np.savez(tmp_path / "x.npz", arr_0=images, labels=np.arange(3))
    out = tmp_path / "data"
    encode(tmp_path / "x.npz", out, small_tokenizer, views="ten_crop", scales="1.5,1.25")
    codes = np.load(out / "codes.npy")
    assert codes.shape == (3, 20, 16)
    model = tokenizer.load_tokenizer(small_tokenizer)
    for i, scale in enumerate((1.5, 1.25)):
        larger = [tokenizer.center_crop(Image.fromarray(x), int(16 * scale)) for x in images]
        views = tokenizer.crops(from_uint8(np.stack(larger)), 16, "ten_crop")
        for j, view in enumerate(views):
            assert np.array_equal(model.encode(view).flatten(1), codes[:, 10 * i + j])
    assert len(np.unique(codes[0], axis=0)) > 10  # the views do differ
    encode(tmp_path / "x.npz", out, small_tokenizer, split="val")
    assert npp.Codes(str(out)).val[0].shape[0] == 3


def test_an_unreadable_image_is_named_and_the_rest_encoded(tmp_path, small_tokenizer, capsys):
    images = class_folder(tmp_path / "images", random_images(6))
    unreadable = tmp_path / "images" / "a" / "001.png"
    unreadable.write_text("no picture")
    data = tmp_path / "data"
    encode(images, data, small_tokenizer, code=2)
    message = capsys.readouterr().err
    assert message.count("unreadable image") == 1
    assert "001.png" in message
    assert np.load(data / "labels.npy").tolist() == [0, 0, 1, 1, 1]
    assert len(np.load(data / "codes.npy")) == 5
    Image.fromarray(random_images(1)[0]).save(unreadable)
    encode(images, data, small_tokenizer)  # it is tried again
    assert len(np.load(data / "codes.npy")) == 6


def test_a_rank_that_loses_the_other_ends_and_two_go_on_to_the_same_files(
        tmp_path, small_tokenizer):
    images = class_folder(tmp_path / "images", random_images(400, seed=4))
    for name in ("a/007.png", "b/350.png"):
        (tmp_path / "images" / name).write_text("no picture")
    whole = tmp_path / "whole"
    encode(images, whole, small_tokenizer, code=2)
    assert np.load(whole / "codes.npy").shape == (398, 2, 16)
    assert np.bincount(np.load(whole / "labels.npy")).tolist() == [199, 199]

    # Kill the second rank after its first part: the first rank writes its own parts, and ends.
    killed = tmp_path / "killed"
    command = encoding(images, killed, small_tokenizer)
    first, second = two_ranks(command)
    wait_for(killed / "codes.part" / "000000064.npz", second)
    second.kill()
    second.communicate(timeout=30)
    assert second.returncode == -signal.SIGKILL
    _, message = first.communicate(timeout=60)
    assert message.endswith("tokenizer.py: another rank ended before the work was done\n")
    assert first.returncode == 2
    assert message.count("\n") == 2
    assert "007.png" in message
    assert not (killed / "codes.part" / "000000320.npz").exists()
    with pytest.raises(BadInput):
        npp.Codes(str(killed))

    # The same command goes on. The files are those of one process.
    ranks = two_ranks(command)
    message = ""
    for process in ranks:
        message += process.communicate(timeout=60)[1]
    assert [process.returncode for process in ranks] == [2, 0]
    assert message.count("unreadable image") == 2
    assert "007.png" in message
    assert "350.png" in message
    assert files(killed) == files(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_one_line_and_keeps_the_parts(tmp_path, small_tokenizer, number):
    images = image_file(tmp_path / "x.npz", n=2000)
    process = program(encoding(images, tmp_path / "data", small_tokenizer))
    parts = tmp_path / "data" / "codes.part"
    wait_for(parts / "000000064.npz", process)
    process.send_signal(number)
    _, message = process.communicate(timeout=30)
    assert message == "tokenizer.py: stopped\n"
    assert process.returncode == 130
    assert not list(parts.glob("*.part"))


# ---- 8. Codes as images


@pytest.mark.parametrize("split, suffix", [("train", ""), ("val", "_val")])
def test_show_decodes_ten_images_of_ten_classes(tmp_path, capsys, split, suffix):
    path = str(tmp_path / "x.png")
    assert tokenizer.main(["show", FASHION, path, "--split", split]) == 0
    assert "T-shirt, Trouser, Pullover" in capsys.readouterr().out
    codes = np.load(os.path.join(FASHION, f"codes{suffix}.npy"), mmap_mode="r")
    labels = np.load(os.path.join(FASHION, f"labels{suffix}.npy"))
    boots = np.flatnonzero(labels == 9)[:10]
    model = tokenizer.load_tokenizer(os.path.join(FASHION, "tokenizer.pt"))
    codes_of_boots = torch.from_numpy(codes[boots, 0].astype(int)).view(10, 8, 8)
    expected = to_uint8(model.decode(codes_of_boots))
    sheet = np.asarray(Image.open(path))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (10 * 33 - 1, 10 * 33 - 1, 3)
    assert np.array_equal(sheet[9 * 33 :, 3 * 33 : 3 * 33 + 32], expected[3])


def test_reconstructions_become_an_npz_for_fid_or_a_picture(tmp_path, small_tokenizer, capsys):
    source = str(tmp_path / "x.npz")
    images = random_images(40, seed=8, size=24)
    np.savez(source, arr_0=images, labels=np.arange(40))
    options = flags(tokenizer=small_tokenizer, image_size=24)

    out = str(tmp_path / "again.npz")
    assert tokenizer.main(["reconstruct", source, out] + options) == 0
    with np.load(out) as saved:
        again = saved["arr_0"]
        assert saved["labels"].tolist() == list(range(40))
    model = tokenizer.load_tokenizer(small_tokenizer)
    expected = to_uint8(model.decode(model.encode(from_uint8(images[32:]))))
    assert np.array_equal(again[32:40], expected)
    assert f"PSNR {psnr(images, again):.2f} dB" in capsys.readouterr().out

    out = str(tmp_path / "again.png")
    assert tokenizer.main(["reconstruct", source, out, "--margin", "2"] + options) == 0
    assert f"PSNR {psnr(images, again, margin=2):.2f} dB" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (4 * 25 - 1, 10 * 25 - 1, 3)
    assert np.array_equal(sheet[:24, 25:49], images[1])
    assert np.array_equal(sheet[25:49, 25:49], again[1])


# ---- 9. The command line


@pytest.mark.parametrize("command, words", [
    ([], ["train", "encode", "show", "reconstruct"]),
    (["encode"], ["--views", "--scales", "ten_crop", "--split"]),
])
def test_help_lists_commands_and_flags(capsys, command, words):
    with pytest.raises(SystemExit) as end:
        tokenizer.main(command + ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text


# ---- 10. The codes that LlamaGen extracted


def llamagen_codes(folder, images=5, views=10, grid=4, vocab=16384, seed=0, size=64):
    """A folder as LlamaGen's extract_codes_c2i.py leaves it -> codes (images, views, N)"""
    codes = np.random.default_rng(seed).integers(0, vocab, (images, views, grid**2))
    codes_folder = folder / f"imagenet{size}_codes"
    labels_folder = folder / f"imagenet{size}_labels"
    codes_folder.mkdir(parents=True)
    labels_folder.mkdir()
    for i in range(images):
        np.save(codes_folder / f"{i}.npy", codes[i : i + 1])
        np.save(labels_folder / f"{i}.npy", np.array([i % 3]))
    return codes


def test_pack_adopts_the_codes_of_llamagen(tmp_path):
    first = llamagen_codes(tmp_path / "c2i_ten_crop", images=11)
    second = llamagen_codes(tmp_path / "c2i_ten_crop_105", images=11, seed=1)
    out = str(tmp_path / "data")
    assert pack.main([str(tmp_path / "c2i_ten_crop") + "/", out]) == 0
    data = npp.Codes(out)
    assert np.array_equal(data.codes, np.concatenate([first, second], axis=1))
    assert data.codes.dtype == np.uint16
    assert data.labels.tolist() == [i % 3 for i in range(11)]
    assert json.loads(Path(out, "meta.json").read_text()) == {
        "vocab": 16384,
        "grid": 4,
        "image_size": 64,
        "classes": ["0", "1", "2"],
        "tokenizer": None,
        "tokenizer_sha256": None,
        "made_by": "data/imagenet/pack.py",
    }


def test_packed_codes_take_a_tokenizer_and_a_val_split(tmp_path, small_tokenizer):
    codes = llamagen_codes(tmp_path / "small", vocab=32, grid=4, views=2, size=16)
    out = str(tmp_path / "named")
    assert pack.main([str(tmp_path / "small"), out, "--tokenizer", small_tokenizer]) == 0
    assert np.array_equal(np.load(os.path.join(out, "codes.npy")), codes)
    images = class_folder(tmp_path / "images", random_images(6), names="xyz")
    encode(images, out, small_tokenizer, split="val")
    assert json.loads(Path(out, "meta.json").read_text())["classes"] == ["0", "1", "2"]
    assert npp.Codes(out).val


# ---- Bad input: one line that names it, exit code 2


def test_a_file_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"a file")

    def write(file):
        raise KeyboardInterrupt

    with pytest.raises(BadInput, match="cannot be written"):
        tokenizer.replace_file(str(tmp_path / "x.pt" / "below a file"), write)


def test_files_that_are_no_checkpoint_are_named_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": torch.arange(1000.0)}, "good.pt")
    good = Path("good.pt").read_bytes()
    middle = len(good) // 2
    flipped = bytearray(good)
    flipped[middle] ^= 1
    bad = {
        "flipped": bytes(flipped),
        "half": good[:middle],
        "empty": b"",
        "pickle": pickle.dumps({"model": Evil()}, protocol=2),
        "text": b"no checkpoint",
        "zip": b"PK\x05\x06" + bytes(18),
    }
    for name, content in bad.items():
        Path(name).write_bytes(content)
    torch.save({"model": Evil()}, "evil")
    torch.save(torch.arange(1000.0), "tensor")
    os.mkdir("folder")
    for name in list(bad) + ["evil", "tensor", "folder", "missing"]:
        with pytest.raises(BadInput) as error:
            tokenizer.load_file(name)
        message = str(error.value)
        assert message.startswith(f"{name}: "), message
        assert "weights_only" not in message
        assert "\n" not in message
        assert len(message) < 200
    assert not os.path.exists("hacked")
    assert torch.equal(tokenizer.load_file("good.pt")["model"], torch.arange(1000.0))


def test_a_tokenizer_that_lacks_a_weight_or_has_another_is_refused(tmp_path):
    path = str(tmp_path / "t.pt")
    lacking = tokenizer.VQModel(**SMALL).state_dict()
    del lacking["decoder.mid.1.norm.bias"]
    torch.save({"model": lacking}, path)
    with pytest.raises(BadInput, match="decoder.mid.1.norm.bias"):
        tokenizer.load_tokenizer(path)
    extended = tokenizer.VQModel(**SMALL).state_dict()
    extended["extra.weight"] = torch.zeros(1)
    torch.save({"model": extended}, path)
    with pytest.raises(BadInput, match="extra.weight"):
        tokenizer.load_tokenizer(path)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"model": {}}, "expected LlamaGen's tokenizer"),
        ({"model": 3}, "expected LlamaGen's tokenizer"),
        ([1, 2], "holds a list, expected a dict"),
        (torch.zeros(3), "holds a Tensor, expected a dict"),
    ],
)
def test_a_file_of_something_else_is_no_tokenizer(tmp_path, foreign, message):
    torch.save(foreign, tmp_path / "t.pt")
    with pytest.raises(BadInput, match=message):
        tokenizer.load_tokenizer(str(tmp_path / "t.pt"))


def test_a_tokenizer_with_nan_is_refused(tmp_path):
    state = tokenizer.VQModel(**SMALL).state_dict()
    state["decoder.conv_in.bias"][3] = torch.nan
    torch.save({"model": state}, tmp_path / "nan.pt")
    with pytest.raises(BadInput, match="decoder.conv_in.bias holds NaN"):
        tokenizer.load_tokenizer(str(tmp_path / "nan.pt"))


def test_a_tokenizer_of_other_codes_is_refused(small_tokenizer):
    digest = tokenizer.sha256(small_tokenizer)
    for meta in (None, {}, {"vocab": 32, "tokenizer_sha256": digest}, {"tokenizer_sha256": None}):
        assert not tokenizer.load_tokenizer(small_tokenizer, meta=meta).training
    with pytest.raises(BadInput, match="small.pt: 32 codes, expected 33"):
        tokenizer.load_tokenizer(small_tokenizer, meta={"vocab": 33})
    with pytest.raises(BadInput, match=f"{digest}.*another.*0000"):
        tokenizer.load_tokenizer(small_tokenizer, meta={"tokenizer_sha256": "0" * 64})


def test_a_folder_that_may_not_be_read_is_named(tmp_path, capsys, monkeypatch):
    class_folder(tmp_path / "images", random_images(4))
    monkeypatch.chdir(tmp_path)  # for another user the folders above may be closed too
    tmp_path.chmod(0o755)
    user = os.geteuid()
    for closed in ("images/a", "images"):
        os.chmod(closed, 0)
        if user == 0:  # root may read everything
            os.seteuid(65534)
        try:
            refuses(capsys, ["train", "images", "x.pt"], f"{closed}: cannot be read (Permission")
        finally:
            os.seteuid(user)
            os.chmod(closed, 0o755)


@pytest.mark.parametrize("change, words", [
    ({"labels": np.array([0, 1, -1])}, ("the label of image 2 is -1", "expected 0 to")),
    ({"labels": np.array([0, 65536, 1])}, ("the label of image 1 is 65536", "0 to 65535")),
    ({"labels": np.array([0, 1, 2**64 - 1], np.uint64)}, ("the label of image 2 is 1844",)),
    ({"labels": np.array([0, 2, 1]), "classes": ["a", "b"]}, ("image 1 is 2", "0 to 1")),
    ({"labels": np.array([0, 0.9, 1])}, ("labels are float64",)),
    ({"labels": np.array([0, 1])}, ("labels are int64 (2,)", "(3,)")),
    ({"classes": np.array(3)}, ("classes are int64 ()",)),
    ({"classes": np.arange(3)}, ("classes are int64 (3,)",)),
    ({"classes": "cat"}, ("classes are", "()")),
    ({"arr_0": np.zeros((3, 16, 16), np.uint8)}, ("arr_0 is uint8 (3, 16, 16)",)),
    ({"arr_0": np.zeros((3, 16, 16, 3))}, ("arr_0 is float64",)),
    ({"arr_0": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, int)}, ("no images",)),
    ({"arr_0": np.array([Evil()])}, ("expected arr_0 and labels",)),
])
def test_bad_arrays_of_images_are_named(tmp_path, capsys, change, words):
    arrays = {"arr_0": random_images(3), "labels": np.arange(3)}
    arrays.update(change)
    np.savez(tmp_path / "x.npz", **arrays)
    refuses(capsys, ["train", tmp_path / "x.npz", tmp_path / "t.pt"], "x.npz: ", *words)


def test_images_of_which_none_is_readable_leave_nothing(tmp_path, small_tokenizer, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_text("no picture")
    encode(tmp_path / "images", tmp_path / "x", small_tokenizer, code=2)
    assert "not one readable image" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "x")


def test_another_encoding_under_way_is_not_touched(tmp_path, small_tokenizer, capsys):
    images = class_folder(tmp_path / "images", random_images(6))
    out = tmp_path / "data"
    (out / "codes.part").mkdir(parents=True)
    plan = {"vocab": 32, "grid": 4, "image_size": 16}
    (out / "codes.part" / "plan.json").write_text(json.dumps(plan))
    before = files(out)
    command = encoding(images, out, small_tokenizer, views="one")
    refuses(capsys, command, "codes.part", "views is None there, one here")
    assert files(out) == before


def test_a_val_split_of_other_classes_is_refused(tmp_path, small_tokenizer, capsys):
    out = tmp_path / "data"
    images = class_folder(tmp_path / "images", random_images(6))
    refuses(capsys, encoding(images, out, small_tokenizer, split="val"), "meta.json")
    encode(images, out, small_tokenizer)
    before = files(out)
    other = class_folder(tmp_path / "other", random_images(6), names="xyz")
    three = image_file(tmp_path / "three.npz", classes=3)
    for wrong in (other, three):
        refuses(capsys, encoding(wrong, out, small_tokenizer, split="val"), "classes is")
        assert files(out) == before
    unnamed = image_file(tmp_path / "two.npz", classes=2)
    encode(unnamed, out, small_tokenizer, split="val")


def test_show_wants_a_data_set_and_its_tokenizer(tmp_path, small_tokenizer, capsys):
    out = tmp_path / "data"
    picture = tmp_path / "x.png"
    command = ["show", str(out), str(picture)]
    refuses(capsys, command, "meta.json: expected what")
    encode(image_file(tmp_path / "x.npz"), out, small_tokenizer)
    refuses(capsys, command + ["--split", "val"], "codes_val.npy")
    meta = json.loads((out / "meta.json").read_text())

    unnamed = dict(meta, tokenizer=None)
    (out / "meta.json").write_text(json.dumps(unnamed))
    refuses(capsys, command, "expected --tokenizer")
    assert tokenizer.main(command + ["--tokenizer", small_tokenizer]) == 0
    os.remove(picture)

    of_another = dict(meta, tokenizer_sha256="0" * 64)
    (out / "meta.json").write_text(json.dumps(of_another))
    refuses(capsys, command, "sha256", "0000")

    (out / "meta.json").write_text(json.dumps(meta))
    np.save(out / "codes.npy", np.full((40, 2, 16), 32, np.uint8))
    refuses(capsys, command, "codes.npy: 32, expected codes from 0 to 31")
    assert not picture.exists()


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_reconstructions_of_unreadable_images_are_refused(tmp_path, small_tokenizer, capsys, name):
    images = class_folder(tmp_path / "images", random_images(6))
    (tmp_path / "images" / "a" / "notes.txt").write_text("no picture")
    out = tmp_path / name
    options = flags(tokenizer=small_tokenizer, image_size=16)
    refuses(capsys, ["reconstruct", images, out] + options, "notes.txt")
    assert not out.exists()
    assert not os.path.exists(f"{out}.part")


@pytest.mark.parametrize("command, words", [
    ("", "COMMAND"),
    ("enkode images x", "enkode"),
    ("train images", "out"),
    ("train broken.npz x", "broken.npz"),
    ("train empty x", "no images"),
    ("train images x --stepz 3", "--stepz"),
    ("train images x --step 3", "--step"),
    ("train images x --steps 0", "--steps is 0"),
    ("train images x --batch 9223372036854775808", "--batch is 9223"),
    ("train images x --lr nan", "--lr is nan"),
    ("train images x --lr -1", "--lr is -1.0"),
    ("train images x --seed 1" + 30 * "0", "--seed is 1000"),
    ("train images x --seed -1", "-1"),
    ("train images x --codebook_size 0", "--codebook_size is 0, expected 1 to 65536"),
    ("train images x --codebook_size 65537", "--codebook_size is 65537"),
    ("train images x --ch 20", "--ch is 20"),
    ("train images x --ch 40", "multiple of 32"),
    ("train images x --ch_mult 0,1", "--ch_mult is 0"),
    ("train images x --ch_mult 1000000,1", "--ch_mult is 1000000"),
    ("train images x --z_channels 9999999", "--z_channels"),
    ("encode images x", "--tokenizer"),
    ("encode images x --tokenizer none.pt", "none.pt"),
    ("encode nowhere x --tokenizer t.pt --image_size 16", "nowhere"),
    ("encode images x --tokenizer t.pt --image_size 18", "--image_size is 18, multiple of 4"),
    ("encode images x --tokenizer t.pt --image_size 100000", "--image_size is 100000, to 1024"),
    ("encode images x --tokenizer t.pt --split test", "--split, 'test'"),
    ("encode images x --tokenizer t.pt --image_size 16 --split val --views ten_crop", "--views"),
    ("encode images x --tokenizer t.pt --scales 1.1,a", "--scales"),
    ("encode images x --tokenizer t.pt --image_size 16 --views ten_crop --scales nan", "nan"),
    ("encode images x --tokenizer t.pt --image_size 16 --views ten_crop --scales 1.1,0.5", "0.5"),
    ("encode images x --tokenizer t.pt --image_size 16 --views ten_crop --scales " + 400 * "1",
     "--scales is inf"),
    ("show images x", "images"),
    ("reconstruct images x --tokenizer t.pt --image_size 16", "x: expected a .png or an .npz"),
    ("reconstruct images x.png --tokenizer t.pt --image_size 0", "--image_size is 0"),
    ("reconstruct images x.png --tokenizer t.pt --image_size 16 --margin 8", "--margin is 8"),
])
def test_bad_arguments_of_the_tokenizer_are_named(tmp_path, capsys, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    class_folder(tmp_path / "images", random_images(6))
    os.mkdir("empty")
    Path("broken.npz").write_bytes(b"PK")
    random_tokenizer("t.pt", seed=0)
    refuses(capsys, command.split(), *words.split(", "))
    assert not os.path.exists("x")


def test_only_encode_runs_in_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(capsys, ["train", tmp_path, "x.pt"], "train runs in one process")


def test_a_line_stays_one_line_whatever_a_file_is_called(tmp_path, small_tokenizer, capsys):
    images = class_folder(tmp_path / "images", random_images(2))
    (tmp_path / "images" / "a" / "two\nlines.png").write_text("no picture")
    refuses(capsys, encoding(images, tmp_path / "x", small_tokenizer), "two lines.png")
    refuses(capsys, ["train", "no\nfile", "x"], "no file")


def test_pack_refuses_what_is_no_folder_of_codes(tmp_path, capsys):
    refuses(capsys, [tmp_path / "nowhere", tmp_path / "x"], "nowhere", main=pack.main)
    refuses(capsys, [tmp_path, tmp_path / "x"], "expected one folder", main=pack.main)
    refuses(capsys, ["--pack"], main=pack.main)


@pytest.mark.parametrize("name, content, words", [
    ("c_ten_crop/imagenet64_codes/2.npy", None, ("2.npy", "missing")),
    ("c_ten_crop/imagenet64_labels/2.npy", None, ("2.npy", "missing")),
    ("c_ten_crop/imagenet64_codes/3.npy", b"broken", ("3.npy", "damaged")),
    ("c_ten_crop/imagenet64_codes/3.npy", np.zeros((1, 10, 9), int), ("3.npy", "(1, 10, 9)")),
    ("c_ten_crop/imagenet64_codes/3.npy", np.full((1, 10, 16), 16384), ("3.npy", "16383")),
    ("c_ten_crop/imagenet64_codes/0.npy", np.zeros((10, 16), int), ("0.npy", "(10, 16)")),
    ("c_ten_crop/imagenet64_codes/x.npy", np.zeros((1, 10, 16), int), ("x.npy",)),
    ("c_ten_crop_105/imagenet64_codes/4.npy", None, ("4.npy", "missing")),
    ("c_ten_crop_105/imagenet64_labels/4.npy", np.array([0]), ("105", "labels")),
    ("c_ten_crop/imagenet96_codes/0.npy", np.zeros(1), ("imagenet96_codes",)),
    ("c_ten_crop/imagenet64_labels/3.npy", np.array([70000]), ("3.npy", "65535")),
])
def test_pack_names_the_file_that_is_wrong(tmp_path, capsys, name, content, words):
    llamagen_codes(tmp_path / "c_ten_crop")
    llamagen_codes(tmp_path / "c_ten_crop_105")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    out = tmp_path / "data"
    refuses(capsys, [tmp_path / "c_ten_crop", out], *words, main=pack.main)
    if out.exists():
        assert not os.listdir(out)
