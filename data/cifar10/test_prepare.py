"""What prepare.py claims: python -m pytest data/cifar10

The archive and the sheets are made here, of batches of 20 images of noise. The pickles are written
as Python 2 wrote those of the real archive.
"""

import io
import json
import os
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import prepare  # noqa: E402
import tokenizer  # noqa: E402

NAMES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
         "test_batch"]
LABELS = list(range(10)) * 2  # of each batch


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", len(LABELS))


def noise(name):
    """The images of a batch, uint8 (20, 32, 32, 3)"""
    rng = np.random.default_rng(NAMES.index(name))
    return rng.integers(256, size=(len(LABELS), 32, 32, 3), dtype=np.uint8)


def python_2_string(data):
    return b"T" + struct.pack("<i", len(data)) + data


def python_2_pickle(images, labels, order="C"):
    """-> {"data": array (n, 3072), "labels": list}, opcode by opcode

    ( marks, t makes a tuple of what follows the mark, c names, R calls, b sets the state, s puts
    into the dict, and a number has J before it. order: that of the array in memory, C or F.
    """
    def number(n):
        return b"J" + struct.pack("<i", n)

    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += python_2_string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + python_2_string(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + python_2_string(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    state = b"(" + number(1) + b"(" + number(planes.shape[0]) + number(planes.shape[1]) + b"t"
    state += dtype + {"C": b"\x89", "F": b"\x88"}[order]  # False, True
    state += python_2_string(planes.tobytes(order)) + b"tb"
    numbers = b"(" + b"".join(number(label) for label in labels) + b"l"
    return (b"\x80\x02}" + python_2_string(b"data") + array + state + b"s"
            + python_2_string(b"labels") + numbers + b"s.")


def write_archive(path, changed):
    """changed: {name of a batch: its bytes, or None to leave it out}"""
    with tarfile.open(path, "w:gz") as archive:
        for name in NAMES:
            data = changed.get(name, python_2_pickle(noise(name), LABELS))
            if data is not None:
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_sheets(folder):
    folder.mkdir()
    for name in NAMES:
        sheet = noise(name).reshape(len(LABELS), 1024, 3)
        Image.fromarray(sheet).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(LABELS * 5))
    (folder / "test_lables.json").write_text(json.dumps(LABELS))


def refused(source, out, pattern):
    """The program refuses the source in a line that matches, and writes nothing"""
    with pytest.raises(tokenizer.BadInput, match=pattern):
        prepare.main([str(source), str(out)])
    assert not out.exists()


def test_both_sources_give_the_same_arrays(tmp_path):
    write_archive(tmp_path / "archive.tar.gz", {})
    write_sheets(tmp_path / "sheets")
    for source in ("archive.tar.gz", "sheets"):
        assert prepare.main([str(tmp_path / source), str(tmp_path / f"of_{source}")]) == 0
    for split, names in (("train", NAMES[:5]), ("test", NAMES[5:])):
        expected = np.concatenate([noise(name) for name in names])
        for source in ("archive.tar.gz", "sheets"):
            arrays = np.load(tmp_path / f"of_{source}" / f"{split}.npz")
            np.testing.assert_array_equal(arrays["arr_0"], expected)
            assert arrays["labels"].dtype == np.int64
            assert arrays["labels"].tolist() == LABELS * len(names)


def test_tokenizer_reads_the_files(tmp_path):
    write_sheets(tmp_path / "sheets")
    assert prepare.main([str(tmp_path / "sheets"), str(tmp_path / "out")]) == 0
    images = tokenizer.Images(str(tmp_path / "out" / "test.npz"), [32])
    assert images.classes[:3] == ["airplane", "automobile", "bird"]
    np.testing.assert_array_equal(images.load(4)[0], noise("test_batch")[4])


@pytest.mark.parametrize("order", ["C", "F"])
def test_pickled_arrays_are_those_that_numpy_reads(tmp_path, order):
    images = noise("test_batch")
    batch = python_2_pickle(images, LABELS, order)
    arrays = pickle.loads(batch, encoding="latin1")
    assert arrays["labels"] == LABELS
    write_archive(tmp_path / "archive.tar.gz", {"test_batch": batch})
    ours, _ = prepare.read_archive(tmp_path / "archive.tar.gz", "test")
    np.testing.assert_array_equal(ours, images)
    planes = ours.transpose(0, 3, 1, 2).reshape(20, 3072)
    np.testing.assert_array_equal(planes, arrays["data"])


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path):
    harmful = pickle.dumps({"data": Attack(str(tmp_path / "ran"))}, protocol=2)
    write_archive(tmp_path / "archive.tar.gz", {"data_batch_3": harmful})
    refused(tmp_path / "archive.tar.gz", tmp_path / "out", r"data_batch_3.*names \w+\.mkdir")
    assert not (tmp_path / "ran").exists()
    pickle.loads(harmful)  # which an ordinary reader would have run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
def test_a_missing_batch_is_named(tmp_path, name):
    write_archive(tmp_path / "archive.tar.gz", {name: None})
    refused(tmp_path / "archive.tar.gz", tmp_path / "out", name)
    write_sheets(tmp_path / "sheets")
    os.remove(tmp_path / "sheets" / f"{name}.png")
    refused(tmp_path / "sheets", tmp_path / "out", f"{name}.png")


def test_wrong_lengths_and_labels_are_refused(tmp_path):
    images = noise("test_batch")
    out = tmp_path / "out"
    damaged = {
        r"test_batch is \(19, 3072\), expected \(20, 3072\)": python_2_pickle(images[1:], LABELS),
        r"test has \(19,\) labels, expected \(20,\)": python_2_pickle(images, LABELS[1:]),
        r"expected 2 each": python_2_pickle(images, [0] * 20),
        r"test_batch cannot be read": python_2_pickle(images, LABELS)[:-9],
    }
    for pattern, batch in damaged.items():
        write_archive(tmp_path / "archive.tar.gz", {"test_batch": batch})
        refused(tmp_path / "archive.tar.gz", out, pattern)

    write_sheets(tmp_path / "sheets")
    labels = tmp_path / "sheets" / "test_lables.json"
    labels.write_text("[1, 2]")
    refused(tmp_path / "sheets", out, r"test has \(2,\) labels, expected \(20,\)")
    labels.write_text('{"a": 1}')
    refused(tmp_path / "sheets", out, "test_lables.json: cannot be read")
    Image.new("L", (1024, 20)).save(tmp_path / "sheets" / "test_batch.png")
    refused(tmp_path / "sheets", out, r"test_batch.png: the pixels are \(20, 1024\)")


def test_other_input_is_refused(tmp_path):
    (tmp_path / "text").write_text("no archive")
    refused(tmp_path / "text", tmp_path / "out", "data_batch_1 cannot be read")
    refused(tmp_path / "nothing", tmp_path / "out", "data_batch_1 cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "data_batch_1.png: cannot be read")
    with pytest.raises(tokenizer.BadInput, match="source, out"):
        prepare.main([])
