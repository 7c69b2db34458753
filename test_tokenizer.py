"""What tokenizer.py claims, as tests: python -m pytest test_tokenizer.py"""

import functools
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import (HERE, class_folder, flags, full_disk, random_images, refuses, start,
                      start_two_ranks, write_pickle_with_code)
from PIL import Image

import tokenizer
from data.imagenet import pack
from tokenizer import from_uint8, to_uint8

FASHION = HERE / "data" / "fashion"
FACES = HERE / "data" / "faces"
# What LlamaGen's VQModel makes of images, with the weights of random_vq(): data/golden/README.md
VQ = HERE / "data" / "golden" / "vq_random.npz"


# ---- Helpers -------------------------------------------------------------------------------------

def random_tokenizer(path, seed=0):
    """32 codes of 4 x 4 pixels that tell images apart"""
    torch.manual_seed(seed)
    model = tokenizer.VQModel(codebook_size=32, ch=32, ch_mult=(1, 1, 1), z_channels=32)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small.pt")


@pytest.fixture
def images(tmp_path):
    """Three images of class a, three of class b"""
    return class_folder(tmp_path / "images", random_images(6))


def image_file(path, images, labels=None, **arrays):
    """Images as an .npz, of classes 0, 1, 2 in turn if no labels are given"""
    if labels is None:
        labels = np.arange(len(images)) % 3
    np.savez(path, arr_0=images, labels=labels, **arrays)
    return path


def command(name, *paths, **values):
    return [name, *map(str, paths), *flags(**values)]


def training(images, out, **changes):
    """The command line of a training of moments"""
    values = {"image_size": 4, "steps": 2, "batch": 2, "ch_mult": 1, "codebook_size": 16}
    values.update(changes)
    return command("train", images, out, **values)


def encoding(images, out, path, **changes):
    """The command line of an encoding by the tokenizer at `path`"""
    values = {"image_size": 16}
    values.update(changes)
    return command("encode", images, out, tokenizer=path, **values)


def encode(images, out, path, **changes):
    return tokenizer.main(encoding(images, out, path, **changes))


def psnr(images, again):
    error = images.astype(float) - again
    return 10 * np.log10(255**2 / np.square(error).mean())


# ---- 1. Files ------------------------------------------------------------------------------------

def test_full_disk_keeps_the_old_file_and_the_finished_parts(tmp_path, images, small):
    out = tmp_path / "data"
    out.mkdir()
    (out / "tokenizer.pt").write_bytes(b"old")
    arguments = encoding(images, out, small)
    with full_disk():
        refuses(tokenizer.main, arguments, "tokenizer.pt: cannot be written (File too large)")
    assert (out / "tokenizer.pt").read_bytes() == b"old"
    assert sorted(os.listdir(out)) == ["codes.npy", "codes.part", "labels.npy", "tokenizer.pt"]
    assert tokenizer.main(arguments) == 0  # continues


def test_parts_left_by_killed_processes_are_removed_after_an_hour(tmp_path):
    now = time.time()
    for name, age in [("x.pt.1.part", 4000), ("x.pt.2.part", 0), ("y.pt.1.part", 4000)]:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (now, now - age))
    tokenizer.replace_file(tmp_path / "x.pt", functools.partial(torch.save, {}))
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "x.pt.2.part", "y.pt.1.part"]


def test_output_that_cannot_be_written_is_found_before_the_work(tmp_path, small, monkeypatch):
    images = image_file(tmp_path / "x.npz", random_images(3))
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(tokenizer, "Images", None)  # nothing is read
    monkeypatch.setattr(tokenizer, "Codes", None)
    for out in (tmp_path / "folder.png", images / "below a file.png"):
        for arguments in (training(images, out), command("show", FASHION, out),
                          command("reconstruct", images, out, tokenizer=small)):
            refuses(tokenizer.main, arguments, out, "cannot be written")


def test_file_that_is_no_tokenizer_is_named_and_runs_no_code(tmp_path, images, small):
    whole = small.read_bytes()
    state = torch.load(small)["model"]
    place = whole.index(state["decoder.conv_out.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[place] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    state.popitem()
    torch.save({"model": state}, tmp_path / "lacking.pt")
    write_pickle_with_code(tmp_path / "code.pt", tmp_path / "code ran")
    reasons = {"flipped.pt": "checksum", "lacking.pt": "post_quant_conv.bias",
               "code.pt": "found damage, another format, or code"}
    for name, reason in reasons.items():
        arguments = encoding(images, tmp_path / "data", tmp_path / name)
        refuses(tokenizer.main, arguments, name, reason)
    assert not (tmp_path / "code ran").exists()


# ---- 2. The model --------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name, size", [("vq16", 96), ("vq8", 64)])
def test_published_tokenizers_give_official_codes_and_images(tmp_path, name, size):
    path = tmp_path / "official.pt"
    torch.save({"model": random_vq(name)}, path)
    model = tokenizer.load_tokenizer(path)
    path.unlink()  # 0.3 GB
    golden = np.load(VQ)
    codes = model.encode(from_uint8(random_images(2, seed=1, size=size)))
    assert np.array_equal(codes.numpy(), golden[f"{name}_codes_{size}"])
    official = torch.from_numpy(golden[f"{name}_images_{size}"])
    difference = model.decode(codes)[..., ::3, ::3] - official
    assert difference.abs().max() / official.abs().max() < 1e-5


@pytest.mark.parametrize("folder, floor", [(FASHION, 25.6), (FACES, 26.8)])
def test_embedded_images_survive_their_codes(folder, floor):
    data = tokenizer.Codes(folder)
    model = tokenizer.load_tokenizer(data.meta["tokenizer"], meta=data.meta)
    reference = np.load(folder / "reference.npz")
    index = np.arange(0, len(reference["labels"]), 79)  # of all ten styles of the faces
    originals = reference["arr_0"][index]
    codes, _ = data.read(data.val, index)
    again = model.encode(from_uint8(originals)).flatten(1)
    assert (again == codes).float().mean() > 0.999  # rounding may differ between machines
    assert psnr(originals, model.pixels(codes)) > floor


# ---- 3. Images -----------------------------------------------------------------------------------

def save_and_read(folder, picture, **options):
    """A picture of 16 x 16 pixels in a file -> its pixels as tokenizer.py reads them"""
    (folder / "a").mkdir()
    picture.save(folder / "a" / "x.png", **options)
    return tokenizer.Images(str(folder), [16]).load(0)[0]


def test_gray_of_16_bits_keeps_its_high_byte(tmp_path):
    gray = Image.fromarray(random_images(1)[0]).convert("L")
    deep = np.asarray(gray) * np.uint16(256) + np.uint16(255)
    pixels = save_and_read(tmp_path, Image.fromarray(deep))
    assert np.array_equal(pixels, gray.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    gray = Image.fromarray(random_images(1)[0]).convert("L")
    hidden = gray.getpixel((0, 0))
    visible = np.asarray(gray) != hidden
    picture = gray.convert(mode)
    if mode == "P":
        pixels = save_and_read(tmp_path, picture, transparency=hidden)
    else:
        picture.putalpha(Image.fromarray(visible))
        pixels = save_and_read(tmp_path, picture)
    expected = np.where(visible, gray, 255)
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_kinds_whose_white_is_a_guess_are_unreadable(tmp_path, mode, capsys):
    (tmp_path / "a").mkdir()
    Image.new(mode, (16, 16)).save(tmp_path / "a" / "x.tiff")
    refuses(tokenizer.main, training(tmp_path, tmp_path / "t.pt"), "no readable image")
    assert f"mode {mode}, expected 8 or 16 bits" in capsys.readouterr().err


def test_center_crop_is_that_of_adm():
    wide = random_images(1, size=80)[0, :64]
    image = Image.fromarray(wide)
    halved = image.resize((40, 32), Image.BOX)
    resized = halved.resize((30, 24), Image.BICUBIC)
    expected = resized.crop((3, 0, 27, 24))
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


def test_class_folder_may_be_a_link_but_links_inside_are_refused(tmp_path, images):
    shutil.move(images / "b", tmp_path / "elsewhere")
    os.symlink("../elsewhere", images / "b")
    assert tokenizer.Images(str(images), [8]).labels.tolist() == [0, 0, 0, 1, 1, 1]
    loop = images / "a" / "loop"
    os.symlink(".", loop)
    refuses(tokenizer.main, training(images, tmp_path / "x.pt"), loop, "a link")


@pytest.mark.parametrize("arrays, words", [
    ({"labels": [0, 1, -1]}, ["labels -1 to 1", "expected 0 to 1"]),
    ({"labels": [0, 1]}, ["(2,)", "(3,)"]),
    ({"arr_1": random_images(3)}, ["arr_1", "(3, 16, 16, 3)"]),
    ({"images": random_images(3)[..., 0]}, ["arr_0 is uint8 (3, 16, 16)"]),
])
def test_bad_arrays_of_images_are_named(tmp_path, arrays, words):
    values = {"images": random_images(3)}
    values.update(arrays)
    path = image_file(tmp_path / "x.npz", **values)
    refuses(tokenizer.main, training(path, tmp_path / "t.pt"), "x.npz: ", *words)


# ---- 4. Pictures, and .npz of samples ------------------------------------------------------------

def test_picture_has_a_class_per_row(tmp_path):
    path = str(tmp_path / "x.png")
    images = np.zeros((6, 32, 32, 3), np.uint8)
    images += np.arange(6, dtype=np.uint8)[:, None, None, None]  # image i is of colour i
    tokenizer.save_images(path, iter([images[:4], images[4:]]), [7, 2, 7, 7, 2, 5])
    sheet = np.asarray(Image.open(path))[..., 0]
    assert sheet.shape == (2 * 98, 2 * 98)  # every pixel is 2 x 2, and a line divides the images
    assert sheet[32::66, 32::66].tolist() == [[0, 2, 3], [1, 4, 255], [5, 255, 255]]
    assert (sheet[64:66] == 255).all()


def test_samples_are_streamed_into_an_npz(tmp_path):
    images = random_images(5)

    def chunks():
        for chunk in (images[:2], images[2:]):
            assert list(tmp_path.glob("x.npz.*.part"))  # there before the images are
            yield chunk

    labels = torch.tensor([3, 1, 2, 0, 70000])
    tokenizer.save_images(str(tmp_path / "x.npz"), chunks(), labels)
    saved = np.load(tmp_path / "x.npz")
    assert saved.files == ["arr_0", "labels"]
    assert np.array_equal(saved["arr_0"], images)
    assert saved["labels"].tolist() == [3, 1, 2, 0, 70000]
    assert os.listdir(tmp_path) == ["x.npz"]


# ---- 5. Training a small one ---------------------------------------------------------------------

def test_train_learns_from_readable_images(tmp_path, images, capsys):
    whole = (images / "b" / "004.png").read_bytes()
    (images / "b" / "half.png").write_bytes(whole[:60])
    psnrs = []
    for steps in (2, 50):
        out = tmp_path / f"{steps}.pt"
        assert tokenizer.main(training(images, out, steps=steps)) == 2
        printed, errors = capsys.readouterr()
        assert "half.png: unreadable image" in errors
        psnrs.append(float(printed.split()[5]))
    assert psnrs[1] > psnrs[0] + 1  # dB
    assert tokenizer.load_tokenizer(out).factor == 1


def test_nan_loss_writes_nothing(tmp_path, images):
    arguments = training(images, tmp_path / "t.pt", steps=9, lr=1e9)
    refuses(tokenizer.main, arguments, "lr is 1000000000.0", "loss is nan")
    assert not (tmp_path / "t.pt").exists()


# ---- 6. A data set -------------------------------------------------------------------------------

def test_class_without_images_is_refused(tmp_path, images, small):
    out = tmp_path / "data"
    arguments = encoding(images, out, small)
    (images / "grape").mkdir()
    refuses(tokenizer.main, arguments, "images of class grape")
    (images / "grape" / "Thumbs.db").write_text("no picture")
    refuses(tokenizer.main, arguments, "images of class grape")
    gap = image_file(tmp_path / "x.npz", random_images(3), labels=[0, 3, 1])
    refuses(tokenizer.main, encoding(gap, out, small), "x.npz: ", "images of class 2")
    assert not (out / "meta.json").exists()


@pytest.mark.parametrize("name, array, words", [
    ("codes.npy", np.zeros((6, 2, 9), np.uint8), ["uint8 (6, 2, 9)", "(images, views, 16)"]),
    ("labels.npy", np.array([0, 1]), ["(2,)", "(6,)"]),
])
def test_damaged_data_set_is_named(tmp_path, images, small, name, array, words):
    out = tmp_path / "data"
    assert encode(images, out, small) == 0
    np.save(out / name, array)
    refuses(tokenizer.main, command("show", out, tmp_path / "x.png"), out, *words)


# ---- 7. Images to codes --------------------------------------------------------------------------

def test_ten_crops_of_two_scales_are_those_of_torchvision(tmp_path, small):
    images = random_images(3, size=64)
    source = image_file(tmp_path / "x.npz", images)
    out = tmp_path / "data"
    assert encode(source, out, small, views="ten_crop", scales="1.5,1.1") == 0
    model = tokenizer.load_tokenizer(small)
    expected = []
    for large in (24, 17):  # int(16 * scale)
        resized = [tokenizer.center_crop(Image.fromarray(image), large) for image in images]
        whole = from_uint8(np.stack(resized))
        end = large - 16
        middle = int(round(end / 2))
        for x in (whole, whole.flip(-1)):
            for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
                view = x[..., top : top + 16, left : left + 16]
                expected.append(model.encode(view).flatten(1))
    codes = np.load(out / "codes.npy")
    assert np.array_equal(codes, torch.stack(expected, dim=1))
    assert len(np.unique(codes[0], axis=0)) > 10  # the views do differ


def test_encode_leaves_out_unreadable_images(tmp_path, images, small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # means nothing without WORLD_SIZE
    (images / "a" / "two\nlines.txt").write_text("no picture")
    os.symlink("nowhere", images / "b" / "broken link")
    out = tmp_path / "data"
    assert encode(images, out, small) == 2
    errors = capsys.readouterr().err
    assert "two lines.txt: unreadable image" in errors
    assert "broken link: unreadable image" in errors
    assert errors.count("\n") == 2
    assert encode(images, out, small, split="val", views="one") == 2
    data = tokenizer.Codes(out)
    assert data.codes.shape == (6, 2, 16)
    assert data.val[0].shape == (6, 1, 16)


def test_killed_encode_continues_on_two_ranks_to_the_codes_of_one(tmp_path, small, monkeypatch):
    # The folders have a name in Latin-1, and a terminal cannot show it.
    latin = os.fsdecode(b"caf\xe9")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    images = class_folder(tmp_path / "images", random_images(600), names=("a", latin))
    (images / "a" / "007.png").write_text("no picture")
    whole = tmp_path / "whole"
    assert encode(images, whole, small, views="one") == 2

    # Kill a process after its first part, beside the parts that another encoding has left.
    killed = tmp_path / latin
    others = killed / "codes.part" / "0123456789abcdef"
    others.mkdir(parents=True)
    (others / "000000256.npz").write_bytes(b"other codes")
    arguments = encoding(images, killed, small, views="one")
    process = start("tokenizer.py", *arguments)
    while not list(killed.glob("codes.part/*/000000000.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "meta.json").exists()

    # The same command continues with the finished part, here changed to tell it from a new one.
    finished = next(killed.glob("codes.part/*/000000000.npz"))
    part = np.load(finished)
    np.savez(finished, codes=31 - part["codes"], labels=part["labels"])
    ranks = start_two_ranks("tokenizer.py", *arguments)
    printed = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 0], printed
    assert "caf\\udce9: 599 images" in printed[0][0]
    codes = np.load(killed / "codes.npy")
    codes[:255] = 31 - codes[:255]
    np.save(killed / "codes.npy", codes)
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes()


RANK_1_ON_A_FULL_DISK = """
import os, resource, tokenizer
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
tokenizer.run_program(tokenizer.main, "tokenizer.py")
"""


def test_rank_that_fails_alone_ends_encode(tmp_path, small):
    images = image_file(tmp_path / "x.npz", random_images(300))
    arguments = encoding(images, tmp_path / "data", small, views="one")
    other, failing = start_two_ranks("-c", RANK_1_ON_A_FULL_DISK, *arguments)
    _, errors = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert errors.count("\n") == 1
    assert "cannot be written" in errors
    assert other.wait(60) != 0
    assert not (tmp_path / "data" / "meta.json").exists()


def test_replaced_images_have_another_fingerprint(tmp_path, images):
    def fingerprint():
        return tokenizer.Images(str(images), [16]).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    other = (images / "b" / "005.png").read_bytes()
    (images / "a" / "000.png").write_bytes(other)
    assert fingerprint() != before


def test_split_must_be_new_and_val_must_fit_train(tmp_path, images, small):
    out = tmp_path / "data"
    refuses(tokenizer.main, encoding(images, out, small, split="val"), "meta.json")
    assert encode(images, out, small) == 0
    other_classes = class_folder(tmp_path / "other", random_images(6), names=("x", "y"))
    refuses(tokenizer.main, encoding(other_classes, out, small, split="val"), "classes")
    other = random_tokenizer(tmp_path / "other.pt", seed=1)
    refuses(tokenizer.main, encoding(images, out, other, split="val"), "tokenizer_sha256")
    assert encode(images, out, small, split="val") == 0
    for split in ("train", "val"):
        refuses(tokenizer.main, encoding(images, out, small, split=split), out, "exists")


# ---- 8. Codes as images --------------------------------------------------------------------------

def test_show_decodes_ten_images_of_ten_classes(tmp_path, capsys):
    path = tmp_path / "x.png"
    assert tokenizer.main(command("show", FASHION, path, split="val")) == 0
    assert "T-shirt, Trouser, Pullover" in capsys.readouterr().out
    data = tokenizer.Codes(FASHION)
    model = tokenizer.load_tokenizer(data.meta["tokenizer"])
    boots = np.flatnonzero(data.val[1] == 9)[:10]
    codes, _ = data.read(data.val, boots)
    tokenizer.save_images(str(tmp_path / "boots.png"), [model.pixels(codes)], np.zeros(10))
    sheet = np.asarray(Image.open(path))
    last_row = np.asarray(Image.open(tmp_path / "boots.png"))
    assert sheet.shape == (2 * 329, 2 * 329, 3)  # 32 pixels and a line, ten times, twice as large
    difference = sheet[-64:].astype(int) - last_row
    assert abs(difference).max() <= 1  # rounding depends on the batch


def test_show_of_a_single_class(tmp_path, small):
    labels = np.zeros(3, int)
    images = image_file(tmp_path / "x.npz", random_images(3), labels)
    assert encode(images, tmp_path / "data", small) == 0
    assert tokenizer.main(command("show", tmp_path / "data", tmp_path / "x.png")) == 0


def test_reconstructions_become_an_npz_for_fid_or_a_picture(tmp_path, small, capsys):
    images = random_images(40, size=24)
    source = tmp_path / "x.npz"
    np.savez(source, images, np.arange(40))  # as ADM's sampler, which calls the labels arr_1
    arguments = command("reconstruct", source, tmp_path / "again.npz", image_size=24,
                        tokenizer=small)
    assert tokenizer.main(arguments) == 0
    saved = np.load(tmp_path / "again.npz")
    again = saved["arr_0"]
    assert saved["labels"].tolist() == list(range(40))
    model = tokenizer.load_tokenizer(small)
    codes = model.encode(from_uint8(images[32:]))
    assert np.array_equal(again[32:], to_uint8(model.decode(codes)))
    assert f"PSNR {psnr(images, again):.2f} dB" in capsys.readouterr().out

    arguments[2] = str(tmp_path / "again.png")
    assert tokenizer.main(arguments + ["--margin", "2"]) == 0
    inside = psnr(images[:, 2:22, 2:22], again[:, 2:22, 2:22])
    assert f"PSNR {inside:.2f} dB" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "again.png"))[::2, ::2]  # every pixel is 2 x 2
    assert sheet.shape == (4 * 25 - 1, 10 * 25 - 1, 3)
    second_column = sheet[:, 25:49]
    assert np.array_equal(second_column[:24], images[1])
    assert np.array_equal(second_column[25:49], again[1])


# ---- 9. The command line -------------------------------------------------------------------------

@pytest.mark.parametrize("line, words", [
    ("train empty x", ["empty: no images", "sub-folder per class"]),
    ("train images x --lr nan", ["--lr is nan"]),
    ("train images t.pt", ["t.pt exists"]),
    ("train images x --codebook_size 65537", ["--codebook_size is 65537"]),
    ("encode images x --tokenizer t.pt --image_size 18", ["--image_size is 18", "multiple of 4"]),
    ("encode images x --tokenizer t.pt --split val --views ten_crop", ["--views"]),
    ("encode images x --tokenizer t.pt --views ten_crop --scales 1.1,0.5", ["0.5"]),
    ("reconstruct images x --tokenizer t.pt", ["x: expected a .png or an .npz"]),
    ("reconstruct images x.png --tokenizer t.pt --image_size 16 --margin 8", ["--margin is 8"]),
])
def test_bad_arguments_are_named(tmp_path, images, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    random_tokenizer("t.pt")
    refuses(tokenizer.main, line.split(), *words)


# ---- 10. The codes that LlamaGen extracted -------------------------------------------------------

def llamagen_codes(folder, views=10, vocab=16384, seed=0, size=64):
    """A folder as LlamaGen's extract_codes_c2i.py leaves it -> codes (11, views, 16)"""
    codes = np.random.default_rng(seed).integers(0, vocab, (11, views, 16))
    for name in ("codes", "labels"):
        (folder / f"imagenet{size}_{name}").mkdir(parents=True)
    for i in range(11):
        np.save(folder / f"imagenet{size}_codes" / f"{i}.npy", codes[i : i + 1])
        np.save(folder / f"imagenet{size}_labels" / f"{i}.npy", [i % 3])
    return codes


def test_pack_adopts_the_codes_of_llamagen(tmp_path):
    first = llamagen_codes(tmp_path / "c2i_ten_crop")
    second = llamagen_codes(tmp_path / "c2i_ten_crop_105", seed=1)
    out = tmp_path / "data"
    assert pack.main([f"{tmp_path}/c2i_ten_crop/", str(out)]) == 0
    data = tokenizer.Codes(out)
    assert data.codes.dtype == np.uint16
    assert np.array_equal(data.codes[:, :10], first)
    assert np.array_equal(data.codes[:, 10:], second)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert data.meta["vocab"] == 16384
    assert data.meta["image_size"] == 64
    assert data.meta["classes"] == ["0", "1", "2"]
    refuses(pack.main, [tmp_path / "c2i_ten_crop", out], "meta.json exists")


def test_packed_codes_take_a_tokenizer_and_a_val_split(tmp_path, small):
    llamagen_codes(tmp_path / "small", vocab=32, views=2, size=16)
    out = tmp_path / "data"
    assert pack.main([str(tmp_path / "small"), str(out), "--tokenizer", str(small)]) == 0
    images = class_folder(tmp_path / "images", random_images(6), names=("0", "1", "2"))
    assert encode(images, out, small, split="val") == 0
    assert tokenizer.Codes(out).val[1].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name, content, words", [
    ("c_ten_crop/imagenet64_codes/2.npy", None, ["labels", "11 files, expected 10"]),
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
