"""What bench.py claims. With NPP_PEER, a checkout of the official code, that is timed too."""

import os

import numpy as np
import pytest
import torch
from conftest import refuses

import bench
import npp

# ---- 1. Counted


@pytest.mark.parametrize("size, patches, grid, printed", [
    ("B", (1,), 16, "25.06"),
    ("XL", (1,), 24, "434.11"),
    ("B", (2, 1), 16, "15.70"),
    ("L", (8, 4, 2, 1), 16, "47.95"),   # the table's row says (2, 1)
    ("XXL", (4, 1), 16, "189.62"),      # printed 189.11 as (2, 1)
])
def test_cost_of_table_2(size, patches, grid, printed):
    average, _ = bench.cost(size, patches, grid=grid)
    assert f"{average / 1e9:.2f}" == printed


def test_relative_cost_of_table_3():
    average, _ = bench.cost("B", (2, 1), lam=3 / 4, grid=2**12)     # the class hardly counts
    next_token, _ = bench.cost("B", (1,), grid=2**12)
    assert f"{average / next_token:.3f}" == "0.438"


def test_plan(capsys):
    bench.main("plan --model B --patches 4,2,1 --batch 1024 --epochs 100".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["4", "31,278", "17", "1.66", "2.9%"]
    assert lines[3].split() == ["1", "62,557", "257", "25.06", "86.2%"]
    assert "average 14.53, 0.5798 of the 25.06" in lines[4]
    assert "7.8 hours" in lines[5]      # 6 * 14.53e9 * 100 * 1,281,167 / 400e12 seconds
    refuses(bench.main, "plan --patches 3,1".split(), "patches is (3, 1)")


# ---- 2. Measured


def test_rates_and_ratios(capsys):
    seconds = {("train p=1", "eager", "ours"): np.array([0.2, 0.1, 0.3]),
               ("train p=2", "eager", "ours"): np.array([0.1, 0.8, 0.6])}
    bench.show(seconds, batch=128, unit=5e-4)
    at_1, at_2 = capsys.readouterr().out.splitlines()
    assert "200 (100 to 300) ms      640 images/s" in at_1  # 128 images in 0.2 seconds
    assert "96.0% of matmul" in at_1            # 3 passes * 128 images * 5e-4 s = 0.192 of 0.2 s
    assert "2 (0.5 to 8) of p=1" in at_2        # the median of each round's ratio


def timed(capsys, *flags):
    """Time tiny inputs -> what stands in the rows: training or sampling, mode, whose code"""
    bench.main("--rounds 1 --batch 2 --grid 4 --compile false".split() + list(flags))
    rows = capsys.readouterr().out.splitlines()[2:]         # after the machine and matmul
    return [" ".join(row[:30].split()) for row in rows]


def test_timer(capsys):
    assert timed(capsys) == ["train p=1 eager ours", "train p=2 eager ours", "train p=4 eager ours",
                             "sample eager ours"]


@pytest.mark.skipif("NPP_PEER" not in os.environ, reason="NPP_PEER names no official checkout")
def test_official_model_with_our_weights(capsys, monkeypatch):
    ours = npp.Transformer(**npp.SIZES["tiny"], vocab=256, classes=1000, grid=4)
    torch.nn.init.normal_(ours.output.weight, std=0.3)
    official = bench.Official(os.environ["NPP_PEER"], ours)
    official.model.cls_embedding.dropout_prob = 0.0
    monkeypatch.setattr(torch.nn.Dropout, "forward", torch.nn.Identity.forward)
    codes = torch.randint(256, (2, 16))
    labels = torch.tensor([3, 7])
    for p in (1, 2, 4):
        loss = ours.loss(codes, labels, p).item()
        assert official(codes, labels, p).item() == pytest.approx(loss)
    assert "sample eager official" in timed(capsys, "--peer", os.environ["NPP_PEER"])
