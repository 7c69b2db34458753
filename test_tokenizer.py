"""What tokenizer.py claims, as tests: python -m pytest test_tokenizer.py"""

import functools
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import HERE, RunsCode, flags, refuses, start, start_on_full_disk, start_two_ranks
from PIL import Image

import tokenizer
from data.imagenet import pack
from tokenizer import BadInput, from_uint8, to_uint8

FASHION = HERE / "data" / "fashion"
FACES = HERE / "data" / "faces"
# What LlamaGen's VQModel makes of images, with the weights of random_vq(): data/golden/README.md
VQ = HERE / "data" / "golden" / "vq_random.npz"
SMALL = {"codebook_size": 32, "ch": 32, "ch_mult": (1, 1, 1), "z_channels": 32}  # 4 pixels a code


# ---- Helpers


def random_images(n, seed=0, size=16):
    """Blotches, so that features differ from image to image"""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def class_folder(folder, images, names="ab"):
    """Images as PNG files in class folders, as many in each"""
    for i, image in enumerate(images):
        path = folder / names[i * len(names) // len(images)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def image_file(path, n=40, size=16, labels=3, **arrays):
    """Random images as an .npz. labels: theirs, or a number of classes that come in turn"""
    if isinstance(labels, int):
        labels = np.arange(n) % labels
    np.savez(path, **({"arr_0": random_images(n, size=size), "labels": labels} | arrays))
    return path


def random_tokenizer(path, seed=0):
    torch.manual_seed(seed)
    tokenizer.save_tokenizer(path, tokenizer.VQModel(**SMALL))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of a random VQModel that tells images apart: 32 codes, 4 pixels each"""
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small.pt")


def command(name, *paths, **values):
    return [name, *map(str, paths), *flags(**values)]


def encoding(images, out, path, image_size=16, **values):
    """The command line of an encoding by the tokenizer at `path`"""
    return command("encode", images, out, tokenizer=path, image_size=image_size, **values)


def encode(*paths, code=0, **values):
    assert tokenizer.main(encoding(*paths, **values)) == code


def training(images, out, **values):
    """The command line of a training of moments"""
    defaults = dict(image_size=4, steps=2, batch=2, ch_mult=1, codebook_size=16)
    return command("train", images, out, **(defaults | values))


def contents(folder):
    """-> {name: bytes} of every file below a folder"""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def psnr(images, again, margin=0):
    inside = slice(margin, images.shape[1] - margin)
    difference = images[:, inside, inside].astype(float) - again[:, inside, inside]
    return 10 * np.log10(255**2 / np.square(difference).mean())


# ---- 1. Files


def test_full_disk_keeps_old_file(tmp_path, small):
    """The disk has no room for a tokenizer, neither for the file of torch.save nor for a copy"""
    images = image_file(tmp_path / "x.npz", size=4)
    out = tmp_path / "t.pt"
    out.write_bytes(b"old")
    for arguments in (training(images, out), encoding(images, tmp_path / "data", small)):
        process = start_on_full_disk("tokenizer.py", *arguments)
        _, message = process.communicate(timeout=60)
        assert process.returncode == 2
        assert message.endswith("cannot be written (File too large)\n")
        assert message.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["data", "t.pt", "x.npz"]
    encode(images, tmp_path / "data", small)  # continues from its parts
    assert len(contents(tmp_path / "data")) == 4


def test_parts_left_by_killed_processes_are_removed_after_an_hour(tmp_path):
    for name in ("x.pt.1.part", "x.pt.2.part", "y.pt.1.part"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("x.pt.1.part", "y.pt.1.part"):
        os.utime(tmp_path / name, (0, time.time() - 4000))
    tokenizer.replace_file(tmp_path / "x.pt", functools.partial(torch.save, {}))
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "x.pt.2.part", "y.pt.1.part"]


def test_output_that_cannot_be_written_is_found_before_the_work(tmp_path, small, monkeypatch):
    images = image_file(tmp_path / "x.npz", size=4)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(tokenizer, "Images", None)  # nothing is read
    monkeypatch.setattr(tokenizer, "Codes", None)
    for out in (tmp_path / "folder.png", images / "below a file.png"):
        refuses(tokenizer.main, training(images, out), out, "cannot be written")
        refuses(tokenizer.main, command("show", FASHION, out), out, "cannot be written")
        refuses(tokenizer.main, command("reconstruct", images, out, tokenizer=small), out, "cannot")


@pytest.mark.parametrize("kind", ["flipped bit", "half", "code", "safetensors", "missing", "list",
                                  "lacks a weight"])
def test_file_that_is_no_tokenizer_is_named_and_runs_no_code(tmp_path, small, kind):
    path = tmp_path / "t.pt"
    good = small.read_bytes()
    state = torch.load(small)["model"]
    weight = good.index(state["decoder.conv_out.weight"].numpy().tobytes())
    content = {"flipped bit": good[:weight] + bytes([good[weight] ^ 1]) + good[weight + 1 :],
               "half": good[: len(good) // 2], "safetensors": (2).to_bytes(8, "little") + b"{}",
               "code": {"model": RunsCode(tmp_path / "code ran")}, "list": [state],
               "lacks a weight": {"model": dict(list(state.items())[:-1])}}.get(kind)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(BadInput) as caught:
        tokenizer.load_tokenizer(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "weights_only" not in message
    assert "checksum" in message or "in a .pt file" in message
    assert "post_quant_conv.bias" in message or kind != "lacks a weight"
    assert not (tmp_path / "code ran").exists()


# ---- 2. The model


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


@pytest.mark.parametrize("name, factor, parameters, size", [
    ("vq16", 16, 71_883_403, 96), ("vq8", 8, 70_109_835, 64)])
def test_published_tokenizers_give_official_codes_and_images(tmp_path, name, factor, parameters,
                                                             size):
    path = tmp_path / "official.pt"
    torch.save({"model": random_vq(name)}, path)
    model = tokenizer.load_tokenizer(path)
    path.unlink()  # 0.3 GB
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert model.factor == factor
    golden = np.load(VQ)
    training_alone = {"quantize.codebook_used"}
    assert set(model.state_dict()) | training_alone == set(golden[f"{name}_names"])
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
    data = tokenizer.Codes(folder)
    model = tokenizer.load_tokenizer(data.meta["tokenizer"], meta=data.meta)
    with np.load(folder / "reference.npz") as reference:
        images = reference["arr_0"][::79]
        assert np.array_equal(reference["labels"], data.val[1])
    codes, _ = data.read(data.val, np.arange(0, len(data.val[1]), 79))
    again = model.encode(from_uint8(images)).flatten(1)
    assert (again == codes).float().mean() > 0.999  # rounding may differ between machines
    assert psnr(images, model.pixels(codes), margin) > floor
    assert model.pixels(codes[:3], 24).shape == (3, 24, 24, 3)


# ---- 3. Images


def save_and_read(folder, picture, format="PNG", **options):
    """A picture of 16 x 16 pixels in a file -> its pixels as tokenizer.py reads them, its label"""
    path = folder / "a" / "deeper" / "x"
    path.parent.mkdir(parents=True)
    picture.save(path, format, **options)
    images = tokenizer.Images(str(folder), [16])
    return images.load(0)[0], images.labels[0]


@pytest.mark.parametrize("mode, format", [("RGB", "WEBP"), ("CMYK", "TIFF"), ("L", "PNG"),
                                          ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG")])
def test_kinds_of_8_and_16_bits_become_rgb(tmp_path, mode, format):
    colour = Image.fromarray(random_images(1, seed=5)[0])
    if mode == "I;16":
        gray = colour.convert("L")
        picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
        expected = gray.convert("RGB")
    else:
        picture = colour.convert(mode)
        expected = picture.convert("RGB")
    pixels, label = save_and_read(tmp_path, picture, format, lossless=True)
    assert np.array_equal(pixels, expected)
    assert label == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    gray = Image.fromarray(random_images(1, seed=5)[0]).convert("L")
    transparent = np.asarray(gray) == gray.getpixel((0, 0))
    if mode == "P":
        picture = gray.convert("P")
        options = {"transparency": gray.getpixel((0, 0))}
    else:
        picture = gray.convert(mode)
        picture.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
        options = {}
    pixels, _ = save_and_read(tmp_path, picture, **options)
    expected = np.where(transparent, 255, np.asarray(gray))
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_kinds_whose_white_is_a_guess_are_unreadable(tmp_path, mode, capsys):
    pixels, label = save_and_read(tmp_path, Image.new(mode, (16, 16), 9), "TIFF")
    assert label == -1
    assert not pixels.any()
    assert f"mode {mode}, expected 8 or 16 bits" in capsys.readouterr().err


def test_center_crop_is_that_of_adm():
    image = Image.fromarray(random_images(1, size=80)[0]).crop((0, 0, 80, 64))
    halved = image.resize((40, 32), Image.BOX)
    expected = halved.resize((30, 24), Image.BICUBIC).crop((3, 0, 27, 24))
    assert np.array_equal(tokenizer.center_crop(image, 24), expected)


def test_class_folders_are_read_in_the_order_of_imagefolder(tmp_path, capsys):
    for name in ("b/2.png", "b/10.png", "a/z/1.webp", "a/y/3", "a/y-2/3", "a/1.png", "a/.hidden",
                 "top.txt", "a/.git/4.png", ".DS_Store", ".cache/5.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    data = tokenizer.Images(str(tmp_path), [8])
    expected = ["a/1.png", "a/y/3", "a/y-2/3", "a/z/1.webp", "b/10.png", "b/2.png"]
    assert data.items == [str(tmp_path / name) for name in expected]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert data.classes == ["a", "b"]
    assert "skipping files outside class folders, e.g. top.txt" in capsys.readouterr().err


def test_class_folder_may_be_a_link_but_links_inside_are_refused(tmp_path):
    images = class_folder(tmp_path / "images", random_images(4))
    shutil.move(images / "b", tmp_path / "elsewhere")
    os.symlink("../elsewhere", images / "b")
    assert tokenizer.Images(str(images), [8]).labels.tolist() == [0, 0, 1, 1]
    os.symlink(".", images / "a" / "loop")
    refuses(tokenizer.main, training(images, tmp_path / "x.pt"), images / "a" / "loop", "a link")


def test_labels_of_adms_sampler_are_read(tmp_path):
    np.savez(tmp_path / "x.npz", random_images(3), np.array([0, 1, 1]))
    assert tokenizer.Images(str(tmp_path / "x.npz"), [16]).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("change, words", [
    ({"labels": np.array([0, 1, -1])}, ["labels -1 to 1", "expected 0 to 1"]),
    ({"labels": np.array([0, 2, 1]), "classes": np.array(["a", "b"])}, ["labels 0 to 2"]),
    ({"labels": np.array([0, 0.9, 1])}, ["float64", "expected arr_0 and labels"]),
    ({"labels": np.array([0, 1])}, ["(2,)", "(3,)"]),
    ({"arr_1": random_images(3)}, ["arr_1", "(3, 16, 16, 3)"]),
    ({"arr_0": np.zeros((3, 16, 16), np.uint8)}, ["arr_0 is uint8 (3, 16, 16)"]),
    ({"arr_0": random_images(0), "labels": np.zeros(0, int)}, ["no images"]),
    ({"arr_0": np.array([{}])}, ["expected arr_0 and labels"]),  # a pickle
])
def test_bad_arrays_of_images_are_named(tmp_path, change, words):
    path = image_file(tmp_path / "x.npz", n=3, **change)
    refuses(tokenizer.main, training(path, tmp_path / "t.pt"), "x.npz: ", *words)


# ---- 4. Pictures, and .npz of samples


def test_picture_has_a_class_per_row(tmp_path):
    images = random_images(6, size=32)
    path = str(tmp_path / "x.png")
    tokenizer.save_images(path, iter([images[:4], images[4:]]), [7, 2, 7, 7, 2, 5])
    sheet = np.asarray(Image.open(path))[::2, ::2]  # every pixel is 2 x 2
    expected = np.full((3 * 33, 3 * 33, 3), 255, np.uint8)
    for row, members in enumerate([[0, 2, 3], [1, 4], [5]]):
        for column, i in enumerate(members):
            expected[33 * row :, 33 * column :][:32, :32] = images[i]
    assert np.array_equal(sheet, expected[:-1, :-1])


def test_samples_are_streamed_into_an_npz(tmp_path):
    images = random_images(5)

    def chunks():
        for part in (images[:2], images[2:]):
            assert list(tmp_path.glob("x.npz.*.part"))  # there before the images are
            yield part

    tokenizer.save_images(str(tmp_path / "x.npz"), chunks(), torch.tensor([3, 1, 2, 0, 70000]))
    with np.load(tmp_path / "x.npz") as saved:
        assert saved.files == ["arr_0", "labels"]
        assert np.array_equal(saved["arr_0"], images)
        assert saved["labels"].tolist() == [3, 1, 2, 0, 70000]
    assert os.listdir(tmp_path) == ["x.npz"]


# ---- 5. Training a small one


def test_train_learns_from_readable_images(tmp_path, capsys):
    images = class_folder(tmp_path / "images", random_images(8))
    (images / "a" / "notes.txt").write_text("no picture")
    (images / "b" / "half.png").write_bytes((images / "b" / "004.png").read_bytes()[:60])
    out = tmp_path / "t.pt"
    assert tokenizer.main(training(images, out, steps=110)) == 2
    printed, errors = capsys.readouterr()
    first, last = [float(line.split()[5]) for line in printed.splitlines()]
    assert last > first + 1  # dB
    assert "notes.txt: unreadable image" in errors
    assert "half.png: unreadable image" in errors
    assert errors.count("\n") == 2
    assert tokenizer.load_tokenizer(out).factor == 1


def test_nan_loss_keeps_old_tokenizer(tmp_path):
    (tmp_path / "t.pt").write_bytes(b"old")
    arguments = training(image_file(tmp_path / "x.npz", size=4), tmp_path / "t.pt", steps=9, lr=1e9)
    refuses(tokenizer.main, arguments, "lr is 1000000000.0", "loss is nan")
    assert (tmp_path / "t.pt").read_bytes() == b"old"


# ---- 6. A data set


def test_class_without_images_is_refused(tmp_path, small):
    images = class_folder(tmp_path / "images", random_images(6))
    out = tmp_path / "data"
    (images / "grape").mkdir()
    refuses(tokenizer.main, encoding(images, out, small), "images of class grape")
    (images / "grape" / "Thumbs.db").write_text("no picture")
    refuses(tokenizer.main, encoding(images, out, small), "images of class grape")
    assert not (out / "meta.json").exists()
    gap = image_file(tmp_path / "x.npz", n=3, labels=np.array([0, 3, 1]))
    refuses(tokenizer.main, encoding(gap, out, small), "x.npz: ", "images of class 2")


@pytest.mark.parametrize("name, content, words", [
    ("codes.npy", np.full((6, 2, 16), 32, np.uint8), ["image 0 has code 32", "expected 0 to 31"]),
    ("codes.npy", np.zeros((6, 2, 9), np.uint8), ["uint8 (6, 2, 9)", "(images, views, 16)"]),
    ("codes.npy", b"broken", ["codes.npy: missing or damaged"]),
    ("labels.npy", np.array([0, 0, 0, 1, 1, 2]), ["labels.npy: 0 to 2, expected 0 to 1"]),
    ("labels.npy", np.array([0, 0, 0, 0, 0, 0]), ["images of class b"]),
    ("labels.npy", np.array([0, 1]), ["(2,)", "(6,)"]),
    ("meta.json", b"[", ["meta.json: expected"]),
    ("tokenizer.pt", "another", ["tokenizer.pt: sha256", "another tokenizer made the codes"]),
])
def test_damaged_data_set_is_named(tmp_path, small, name, content, words):
    out = tmp_path / "data"
    encode(class_folder(tmp_path / "images", random_images(6)), out, small)
    if isinstance(content, str):
        random_tokenizer(out / name, seed=1)
    elif isinstance(content, bytes):
        (out / name).write_bytes(content)
    else:
        np.save(out / name, content)
    refuses(tokenizer.main, command("show", out, tmp_path / "x.png"), out, *words)
    assert not (tmp_path / "x.png").exists()


# ---- 7. Images to codes


def test_ten_crops_of_two_scales_are_those_of_torchvision(tmp_path, small):
    out = tmp_path / "data"
    images = random_images(3, size=64)
    encode(image_file(tmp_path / "x.npz", n=3, size=64), out, small, views="ten_crop",
           scales="1.5,1.1")
    views = []
    for large in (24, 17):  # int(16 * scale)
        crops = [tokenizer.center_crop(Image.fromarray(image), large) for image in images]
        whole = from_uint8(np.stack(crops))
        end = large - 16
        middle = int(round(end / 2))
        for x in (whole, whole.flip(-1)):
            for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
                views.append(x[..., top : top + 16, left : left + 16])
    model = tokenizer.load_tokenizer(small)
    expected = torch.stack([model.encode(view).flatten(1) for view in views], dim=1)
    codes = np.load(out / "codes.npy")
    assert np.array_equal(codes, expected)
    assert len(np.unique(codes[0], axis=0)) > 10  # the views do differ


def test_encode_leaves_out_unreadable_images_and_refuses_an_existing_split(tmp_path, small, capsys):
    images = class_folder(tmp_path / "images", random_images(6))
    (images / "a" / "001.png").write_text("no picture")
    os.symlink("nowhere", images / "b" / "broken link")
    out = tmp_path / "data"
    encode(images, out, small, code=2)
    errors = capsys.readouterr().err
    assert "001.png: unreadable image" in errors
    assert "broken link: unreadable image" in errors
    assert errors.count("\n") == 2
    data = tokenizer.Codes(out)
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.codes.shape == (5, 2, 16)
    encode(images, out, small, code=2, split="val", views="one")
    assert tokenizer.Codes(out).val[0].shape == (5, 1, 16)
    for split in ("train", "val"):
        refuses(tokenizer.main, encoding(images, out, small, split=split), out, "exists")
    assert len(contents(out)) == 6


def test_killed_encode_continues_on_two_ranks_to_the_codes_of_one(tmp_path, small):
    images = class_folder(tmp_path / "images", random_images(600))
    (images / "a" / "007.png").write_text("no picture")
    (images / "b" / "550.png").write_text("no picture")
    whole = tmp_path / "whole"
    encode(images, whole, small, code=2, views="one")
    assert np.load(whole / "codes.npy").shape == (598, 1, 16)

    # Kill a process after its first part, beside the parts that another encoding has left.
    killed = tmp_path / "killed"
    (killed / "codes.part" / "0123456789abcdef").mkdir(parents=True)
    (killed / "codes.part" / "0123456789abcdef" / "000000256.npz").write_bytes(b"other codes")
    arguments = encoding(images, killed, small, views="one")
    process = start("tokenizer.py", *arguments)
    while not list(killed.glob("codes.part/*/000000000.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "meta.json").exists()

    # The same command continues, and leaves the finished part as it is.
    finished = next(killed.glob("codes.part/*/000000000.npz"))
    before = finished.stat().st_mtime_ns
    ranks = start_two_ranks("tokenizer.py", *arguments)
    while finished.exists():
        assert finished.stat().st_mtime_ns == before
        time.sleep(0.01)
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 0], errors
    assert contents(killed) == contents(whole)


def test_replaced_images_have_another_fingerprint(tmp_path):
    folder = class_folder(tmp_path / "images", random_images(4))
    before = tokenizer.Images(str(folder), [16]).fingerprint()
    assert tokenizer.Images(str(folder), [16]).fingerprint() == before
    Image.fromarray(random_images(1, seed=9)[0]).save(folder / "a" / "000.png")
    assert tokenizer.Images(str(folder), [16]).fingerprint() != before


def test_rank_that_fails_alone_ends_the_run(tmp_path, small):
    arguments = encoding(image_file(tmp_path / "x.npz"), tmp_path / "data", "none.pt")
    code = ("import os, tokenizer\n"
            f"arguments = {arguments}\n"
            "if os.environ['RANK'] == '0':\n"
            f"    arguments[4] = '{small}'\n"
            "tokenizer.run_program(lambda: tokenizer.main(arguments), 'tokenizer.py')\n")
    first, second = start_two_ranks("-c", code)
    _, message = second.communicate(timeout=60)
    assert message.startswith("tokenizer.py: none.pt: expected LlamaGen's tokenizer")
    assert second.returncode == 2
    first.communicate(timeout=60)
    assert first.returncode == 1


def test_process_with_rank_but_no_world_size_does_all_the_work(tmp_path, small, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    encode(image_file(tmp_path / "x.npz"), tmp_path / "data", small)
    assert len(tokenizer.Codes(tmp_path / "data").codes) == 40


def test_val_split_must_fit_the_train_split(tmp_path, small):
    out = tmp_path / "data"
    images = class_folder(tmp_path / "images", random_images(6))
    refuses(tokenizer.main, encoding(images, out, small, split="val"), "meta.json")
    encode(images, out, small)
    other_names = class_folder(tmp_path / "other", random_images(6), names="xy")
    three = image_file(tmp_path / "three.npz", labels=3)
    for wrong in (other_names, three):
        refuses(tokenizer.main, encoding(wrong, out, small, split="val"), "other codes, classes")
    other = random_tokenizer(tmp_path / "other.pt", seed=1)
    refuses(tokenizer.main, encoding(images, out, other, split="val"), "tokenizer_sha256")
    unnamed = image_file(tmp_path / "two.npz", labels=2)
    encode(unnamed, out, small, split="val")
    assert tokenizer.Codes(out).val[0].shape == (40, 2, 16)


# ---- 8. Codes as images


@pytest.mark.parametrize("split", ["train", "val"])
def test_show_decodes_ten_images_of_ten_classes(tmp_path, capsys, split):
    path = tmp_path / "x.png"
    assert tokenizer.main(command("show", FASHION, path, split=split)) == 0
    assert "T-shirt, Trouser, Pullover" in capsys.readouterr().out
    data = tokenizer.Codes(FASHION)
    pair = data.val if split == "val" else (data.codes, data.labels)
    boots, _ = data.read(pair, np.flatnonzero(pair[1] == 9)[:10])
    expected = tokenizer.load_tokenizer(data.meta["tokenizer"]).pixels(boots)
    sheet = np.asarray(Image.open(path))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (10 * 33 - 1, 10 * 33 - 1, 3)
    assert np.array_equal(sheet[9 * 33 :, 3 * 33 : 3 * 33 + 32], expected[3])


def test_reconstructions_become_an_npz_for_fid_or_a_picture(tmp_path, small, capsys):
    images = random_images(40, size=24)
    source = image_file(tmp_path / "x.npz", size=24, labels=40)
    arguments = command("reconstruct", source, tmp_path / "again.npz", image_size=24,
                        tokenizer=small)
    assert tokenizer.main(arguments) == 0
    with np.load(tmp_path / "again.npz") as saved:
        again = saved["arr_0"]
        assert saved["labels"].tolist() == list(range(40))
    model = tokenizer.load_tokenizer(small)
    codes = model.encode(from_uint8(images[32:]))
    assert np.array_equal(again[32:], to_uint8(model.decode(codes)))
    assert f"PSNR {psnr(images, again):.2f} dB" in capsys.readouterr().out

    arguments[2] = str(tmp_path / "again.png")
    assert tokenizer.main(arguments + ["--margin", "2"]) == 0
    assert f"PSNR {psnr(images, again, margin=2):.2f} dB" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "again.png"))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (4 * 25 - 1, 10 * 25 - 1, 3)
    assert np.array_equal(sheet[:24, 25:49], images[1])
    assert np.array_equal(sheet[25:49, 25:49], again[1])


# ---- 9. The command line


@pytest.mark.parametrize("line, words", [
    ("train images", ["out"]),
    ("train empty x", ["empty: no images", "sub-folder per class"]),
    ("train images x --step 3", ["--step"]),
    ("train images x --lr nan", ["--lr is nan"]),
    ("train images x --codebook_size 65537", ["--codebook_size is 65537"]),
    ("encode images x", ["--tokenizer"]),
    ("encode images x --tokenizer t.pt --image_size 18", ["--image_size is 18", "multiple of 4"]),
    ("encode images x --tokenizer t.pt --split test", ["--split", "'test'"]),
    ("encode images x --tokenizer t.pt --image_size 16 --split val --views ten_crop", ["--views"]),
    ("encode images x --tokenizer t.pt --image_size 16 --views ten_crop --scales 1.1,0.5", ["0.5"]),
    ("reconstruct images x --tokenizer t.pt --image_size 16", ["x: expected a .png or an .npz"]),
    ("reconstruct images x.png --tokenizer t.pt --image_size 16 --margin 8", ["--margin is 8"]),
])
def test_bad_arguments_are_named(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    class_folder(tmp_path / "images", random_images(6))
    os.mkdir("empty")
    random_tokenizer("t.pt")
    refuses(tokenizer.main, line.split(), *words)


def test_any_name_is_shown_on_one_line_of_any_terminal(tmp_path, small, capsys):
    images = class_folder(tmp_path / "images", random_images(4))
    (images / "b").rename(images / os.fsdecode(b"caf\xe9"))
    (images / "a" / "two\nlines").write_text("no picture")
    encode(images, tmp_path / "data", small, code=2)
    assert "two lines: unreadable image" in capsys.readouterr().err
    arguments = command("show", tmp_path / "data", tmp_path / "x.png")
    process = start("tokenizer.py", *arguments, PYTHONIOENCODING="ascii")
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "a, caf\\udce9" in printed


# ---- 10. The codes that LlamaGen extracted


def llamagen_codes(folder, images=5, views=10, vocab=16384, seed=0, size=64):
    """A folder as LlamaGen's extract_codes_c2i.py leaves it -> codes (images, views, 16)"""
    codes = np.random.default_rng(seed).integers(0, vocab, (images, views, 16))
    for name in ("codes", "labels"):
        (folder / f"imagenet{size}_{name}").mkdir(parents=True)
    for i in range(images):
        np.save(folder / f"imagenet{size}_codes" / f"{i}.npy", codes[i : i + 1])
        np.save(folder / f"imagenet{size}_labels" / f"{i}.npy", np.array([i % 3]))
    return codes


def test_pack_adopts_the_codes_of_llamagen(tmp_path):
    first = llamagen_codes(tmp_path / "c2i_ten_crop", images=11)
    second = llamagen_codes(tmp_path / "c2i_ten_crop_105", images=11, seed=1)
    out = tmp_path / "data"
    assert pack.main([f"{tmp_path}/c2i_ten_crop/", str(out)]) == 0
    data = tokenizer.Codes(out)
    assert np.array_equal(data.codes, np.concatenate([first, second], axis=1))
    assert data.codes.dtype == np.uint16
    assert data.labels.tolist() == [i % 3 for i in range(11)]
    assert data.meta == {"vocab": 16384, "grid": 4, "image_size": 64, "classes": ["0", "1", "2"],
                         "tokenizer": None, "tokenizer_sha256": None, "images": 11}
    refuses(pack.main, [tmp_path / "c2i_ten_crop", out], "meta.json exists")


def test_packed_codes_take_a_tokenizer_and_a_val_split(tmp_path, small):
    codes = llamagen_codes(tmp_path / "small", vocab=32, views=2, size=16)
    out = tmp_path / "data"
    assert pack.main([str(tmp_path / "small"), str(out), "--tokenizer", str(small)]) == 0
    encode(class_folder(tmp_path / "images", random_images(6), names="xyz"), out, small,
           split="val")
    data = tokenizer.Codes(out)
    assert np.array_equal(data.codes, codes)
    assert data.meta["classes"] == ["0", "1", "2"]
    assert data.val[1].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name, content, words", [
    ("c_ten_crop/imagenet64_codes/2.npy", None, ["labels", "5 files, expected 4"]),
    ("c_ten_crop/imagenet64_codes/3.npy", np.zeros((1, 10, 9), int), ["3.npy", "(1, 10, 9)"]),
    ("c_ten_crop/imagenet64_codes/3.npy", np.full((1, 10, 16), 16384), ["3.npy", "16383"]),
    ("c_ten_crop_105/imagenet64_labels/4.npy", np.array([0]), ["105", "labels"]),
])
def test_pack_names_the_file_that_is_wrong(tmp_path, name, content, words):
    llamagen_codes(tmp_path / "c_ten_crop")
    llamagen_codes(tmp_path / "c_ten_crop_105")
    if content is None:
        (tmp_path / name).unlink()
    else:
        np.save(tmp_path / name, content)
    refuses(pack.main, [tmp_path / "c_ten_crop", tmp_path / "data"], *words)
    assert not (tmp_path / "data" / "meta.json").exists()
