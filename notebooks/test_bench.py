"""What bench.py claims: python -m pytest notebooks

With NPP_PEER, a checkout of the official code, its rows are tested too.
"""

import argparse
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)

import bench  # noqa: E402
import npp  # noqa: E402

# ---- what is counted


@pytest.mark.parametrize("size, patches, grid, printed", [
    ("B", (1,), 16, "25.06"),
    ("L", (1,), 16, "83.54"),
    ("XL", (1,), 16, "193.35"),
    ("XXL", (1,), 16, "355.72"),
    ("B", (2, 1), 16, "15.70"),
    ("L", (8, 4, 2, 1), 16, "47.95"),
    ("XL", (1,), 24, "434.11"),
])
def test_cost_gives_the_table_of_the_paper(size, patches, grid, printed):
    average, _ = bench.cost(size, patches, grid=grid)
    assert f"{average / 1e9:.2f}" == printed


@pytest.mark.parametrize("size, printed", [("XL", 102.78), ("XXL", 189.11)])
def test_two_rows_of_the_table_cost_more_than_is_printed(size, printed):
    average, (coarse, fine) = bench.cost(size, (2, 1))  # as they are labelled
    assert average / 1e9 > 1.15 * printed
    # What gives the printed numbers is a first half at a quarter of the cost of p = 2.
    assert (fine + coarse / 4) / 2e9 == pytest.approx(printed, abs=0.011)


def test_cost_is_the_average_over_the_stages():
    average, (coarse, fine) = bench.cost("B", (2, 1), lam=0.75)
    assert average == pytest.approx(0.75 * coarse + 0.25 * fine)


@pytest.mark.parametrize("patches, lam, printed", [
    ((2, 1), 1 / 2, "0.625"),
    ((4, 1), 1 / 2, "0.531"),
    ((2, 1), 2 / 3, "0.500"),
    ((2, 1), 3 / 4, "0.438"),
    ((2, 1), 4 / 5, "0.400"),
    ((4, 2, 1), 1 / 2, "0.578"),
    ((8, 4, 2, 1), 1 / 2, "0.572"),
])
def test_cost_without_the_class_position_is_table_3s(patches, lam, printed):
    average, _ = bench.cost("B", patches, lam, grid=2**12)   # one position of 2^24 + 1
    next_token, _ = bench.cost("B", (1,), lam, grid=2**12)
    assert f"{average / next_token:.3f}" == printed


def test_cost_takes_a_size_by_name_or_by_its_numbers():
    assert bench.cost(dict(n_layer=12, n_head=12, dim=768)) == bench.cost("B")


def test_plan_shows_what_a_schedule_costs(capsys):
    assert bench.main(["plan", "--model", "B", "--patches", "2,1"]) == 0
    text = capsys.readouterr().out
    assert "B, 110,888,448 parameters" in text
    assert "average 15.70, 0.6265 of the 25.06" in text
    half = round(300 * 1281167 / 256) // 2
    assert f"{half:,}" in text


@pytest.mark.parametrize("seconds, text", [
    (0.2, "0.2 seconds"),
    (72, "1.2 minutes"),
    (3540, "59 minutes"),
    (360_000, "100.0 hours"),
])
def test_a_plan_names_a_time_in_the_unit_that_fits(seconds, text):
    assert bench.duration(seconds) == text


@pytest.mark.parametrize("flags, words", [
    ("--steps 3 --patches 8,4,2,1", "steps is 3, expected more: none is left for p = 8"),
    ("--patches 2", "patches is (2,)"),
    ("--patches 3,1", "patches is (3, 1)"),
    ("--patches x", "--patches"),
    ("--lam 1", "lam is 1.0"),
    ("--lam nan", "lam is nan"),
    ("--plam 1", "--plam"),
    ("--model M", "M, expected one of"),
    ("--epochs 0", "epochs is 0.0"),
    ("--tflops inf", "tflops is inf"),
    ("--grid 0", "grid is 0"),
])
def test_plan_refuses_what_cannot_be_trained(capsys, flags, words):
    assert bench.main(["plan"] + flags.split()) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


# ---- what is measured


def measured(capsys, flags):
    """-> {name: line} of the rows, and of the ratios"""
    command = f"{flags} --rounds 2 --batch 2 --grid 4 --json"
    assert bench.main(command.split()) == 0
    rows = {}
    ratios = {}
    for text in capsys.readouterr().out.splitlines():
        line = json.loads(text)
        if "note" in line:
            continue
        if "row" in line:
            rows[line["row"]] = line
        else:
            ratios[line["ratio"]] = line
        rounds = line["rounds"]
        assert len(rounds) == 2
        assert min(rounds) > 0
        assert min(rounds) <= line["median"] <= max(rounds)
    return rows, ratios


def test_training_is_timed_by_patch_size_and_by_schedule(capsys):
    rows, ratios = measured(capsys, "--what train")
    names = [f"train ours eager p={p}" for p in (1, 2, 4)]
    assert list(rows)[:5] == ["matmul", "read"] + names
    assert rows["matmul"]["share"] == 1
    work = [rows[name]["TFLOP/s"] * rows[name]["median"] for name in names]
    assert work == pytest.approx([work[0], work[0] / 4, work[0] / 16])
    theory = {"p=2": 1 / 4, "p=4": 1 / 16, "(2,1)": 0.625}
    for schedule, ratio in theory.items():
        assert ratios[f"train ours eager {schedule} / p=1"]["theory"] == ratio
    one = np.array(rows[names[0]]["rounds"])
    two = np.array(rows[names[1]]["rounds"])
    of_schedule = ratios["train ours eager (2,1) / p=1"]["rounds"]
    assert of_schedule == pytest.approx((one + two) / 2 / one)


def test_sampling_and_the_data_pipeline_are_timed(capsys):
    rows, ratios = measured(capsys, "--what sample,data")
    for n in (1, 2):
        for scale in (1, 2):
            row = rows[f"sample {n} guidance {scale} ours eager"]
            assert row["images/s"] > 0
            assert row["codes/s"] == pytest.approx(16 * row["images/s"])
            assert row["of"] in ("matmul", "read")
            assert 0 < row["share"] < math.inf
    assert rows["data in one file"]["images/s"] > 0
    assert rows["data in many files"]["images/s"] > 0
    if not torch.cuda.is_available():
        assert list(ratios) == ["sample 2 guidance 1 ours eager / guidance 2 ours eager",
                                "data, many files / one"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_memory_says_that_it_needs_a_gpu(capsys):
    assert bench.main(["--what", "memory"]) == 0
    assert "memory: left out, it needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--what nothing", "what is nothing"),
    ("--size M", "size is M"),
    ("--rounds 0", "rounds is 0"),
    ("--batch 0", "batch is 0"),
    ("--batch many", "--batch"),
    ("--grid 6", "grid is 6"),
    ("--vocab -1", "vocab is -1"),
    ("--peer nowhere --what train", "nowhere: expected"),
])
def test_bench_refuses_what_it_cannot_time(capsys, flags, words):
    assert bench.main(flags.split()) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.skipif("NPP_PEER" not in os.environ, reason="NPP_PEER names no official checkout")
def test_the_official_model_is_timed_with_our_weights(capsys):
    torch.manual_seed(0)
    args = argparse.Namespace(peer=os.environ["NPP_PEER"], size="tiny", vocab=256, grid=4)
    ours = npp.Transformer(**npp.SIZES["tiny"], vocab=256, classes=1000, grid=4).eval()
    torch.nn.init.normal_(ours.output.weight, std=0.3)
    official = bench.Official(args, ours)
    for module in official.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    official.model.cls_embedding.dropout_prob = 0.0
    codes = torch.randint(256, (2, 16))
    labels = torch.tensor([3, 7])
    for p in (1, 2, 4):
        loss = ours.loss(codes, labels, p).item()
        assert official(codes, labels, p).item() == pytest.approx(loss, 1e-5)
    rows, ratios = measured(capsys, f"--what train,sample --peer {args.peer}")
    for p in (1, 2, 4):
        assert f"train official eager p={p}" in rows
    assert "sample 2 guidance 2 official eager" in rows
    assert "train eager (2,1) official / ours" in ratios
