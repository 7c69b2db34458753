"""What evidence.py claims: python -m pytest notebooks"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)

import evidence  # noqa: E402
import npp  # noqa: E402

STEPS = 20


def write_data(folder, images=96, vocab=16, grid=4, classes=3, views=2):
    """A data set without a tokenizer: codes that depend on the class and the position"""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=images)
    noise = rng.integers(3, size=(images, views, 1))
    codes = labels[:, None, None] + np.arange(grid**2) + noise
    codes = (codes % vocab).astype(np.uint8)
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "codes_val.npy", codes[:32])
    np.save(folder / "labels_val.npy", labels[:32])
    meta = {
        "vocab": vocab,
        "grid": grid,
        "image_size": 4 * grid,
        "classes": [f"class {i}" for i in range(classes)],
        "tokenizer": None,
        "tokenizer_sha256": None,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def short_run(data):
    """Flags of npp.py"""
    return ["--data", data, "--steps", str(STEPS), "--batch", "8", "--lr", "0.03"]


def train(data, variant, path, *more):
    """-> model, validation losses"""
    patches = ",".join(str(p) for p in variant.patches)
    flags = ["--patches", patches, "--lam", str(variant.lam)]
    config = npp.parse(short_run(data) + flags + list(more))
    model, validation, _ = evidence.train(variant, config, npp.Codes(data), str(path))
    return model, validation


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- the loop


@pytest.mark.parametrize("name, flags", [
    ("2-1", ["--patches", "2,1", "--dropout", "0.1"]),
    ("constant", ["--patches", "1", "--warmup_epochs", "0", "--decay_frac", "0"]),
    ("constant_warmup", ["--patches", "1", "--decay_frac", "0"]),
])
def test_weights_and_losses_equal_those_of_npp_bit_for_bit(data, tmp_path, name, flags):
    dropout = flags[2:] if "--dropout" in flags else []
    model, validation = train(data, evidence.VARIANTS[name], tmp_path / "ours.pt", *dropout)
    out = tmp_path / "npp"
    command = short_run(data) + ["--out", str(out), "--eval_every", str(STEPS)]
    assert npp.main(command + flags) == 0
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    assert saved["step"] == STEPS
    assert same(model.state_dict(), saved["model"])
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert validation[-1] == [STEPS, last["val_loss"]]


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(data, tmp_path):
    variant = evidence.VARIANTS["optimizer_reset"]
    whole, validation = train(data, variant, tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_evidence as t;"
            "t.train(sys.argv[2], t.evidence.VARIANTS['optimizer_reset'], sys.argv[3])")
    command = [sys.executable, "-c", code, HERE, data, str(path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    resumed, of_both = train(data, variant, path)
    assert same(whole.state_dict(), resumed.state_dict())
    assert of_both == validation


def test_a_stage_of_no_steps_is_refused(data, tmp_path):
    variant = evidence.Variant("(4,2,1)", (4, 2, 1), lam=0.01)
    with pytest.raises(evidence.BadInput, match="none is left for p = 4"):
        train(data, variant, tmp_path / "ckpt.pt")


# ---- the variants


def test_the_constant_rate_never_changes_and_the_others_warm_up():
    cfg = npp.parse(["--patches", "1"])
    rate = cfg.lr * cfg.batch / 256
    for step in (0, 600, 1199):
        assert evidence.constant_rate(step, cfg, 100) == pytest.approx(rate)
    assert evidence.constant_after_warmup(0, cfg, 100) == pytest.approx(rate / 100)
    assert evidence.constant_after_warmup(1199, cfg, 100) == pytest.approx(rate)
    assert evidence.npp_schedule(1199, cfg, 100) < rate / 50


def test_equal_cost_means_the_same_multiply_adds():
    equal = evidence.VARIANTS["equal_cost"]
    steps = round(1200 * equal.share)
    assert steps == 757
    ratio = evidence.spent(equal, steps) / evidence.spent(evidence.NPP, 1200)
    assert abs(ratio - 1) < 1e-3
    assert evidence.spent(evidence.NPP, 1200, until=600) == pytest.approx(600 * 17 / 65)


def test_rescaled_averages_are_as_large_as_embeddings():
    torch.manual_seed(0)
    x = torch.randn(4, 64, 256)
    assert npp.patchify(x, 2).std() < 0.55
    assert abs(evidence.rescale(x, 2).std() - 1) < 0.05


def test_averaged_positions_put_patches_p_codes_apart():
    torch.manual_seed(0)
    same_everywhere = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 1, 65, 32)
    q, k = same_everywhere
    codes = npp.rope_2d(8, 32)
    patches = evidence.rope_of_averages(8, 32, 2)

    def score(rope, i, j):  # of positions in reading order, the class before them
        at_i = npp.rotate(q[:, :, i:i + 1], rope[i:i + 1])
        at_j = npp.rotate(k[:, :, j:j + 1], rope[j:j + 1])
        return (at_i * at_j).sum()

    # One row down and one column right is five patches on, and two rows and columns of codes.
    torch.testing.assert_close(score(patches, 1, 6), score(codes, 1, 19))
    assert (patches[0] == 0).all()
    assert not torch.equal(patches[1:], npp.rope_2d(4, 32)[1:])


@pytest.mark.parametrize("loss", [evidence.rescaled_embeddings, evidence.averaged_positions,
                                  evidence.output_only])
def test_losses_are_the_usual_one_at_p_1_and_another_at_p_2(loss):
    torch.manual_seed(0)
    model = npp.Transformer(2, 2, 32, vocab=11, classes=3, grid=4)
    torch.nn.init.normal_(model.output.weight, std=0.3)  # zero weights would hide every difference
    codes = torch.randint(11, (2, 16))
    labels = torch.tensor([0, 2])
    usual = model.loss(codes, labels, 1)
    assert torch.equal(loss(model, codes, labels, 1), usual)
    usual = model.loss(codes, labels, 2)
    assert not torch.allclose(loss(model, codes, labels, 2), usual)


def test_output_only_predicts_the_block_that_begins_at_a_code():
    codes = torch.arange(16)[None]
    blocks = evidence.blocks_from_each_code(codes, 2)[0]
    assert blocks[0].tolist() == [0, 1, 4, 5]
    assert blocks[5].tolist() == [5, 6, 9, 10]
    assert blocks[15].tolist() == [15, 15, 15, 15]


def test_a_reset_optimizer_counts_the_steps_of_the_last_stage(data, tmp_path):
    def steps(name):
        path = tmp_path / f"{name}.pt"
        train(data, evidence.VARIANTS[name], path)
        saved = torch.load(path, weights_only=True)
        return {state["step"].item() for state in saved["optimizer"]["state"].values()}

    assert steps("2-1") == {STEPS}
    assert steps("optimizer_reset") == {STEPS // 2}


def test_the_doubled_rate_is_doubled_only_where_p_is_2():
    cfg = npp.parse(["--patches", "2,1", "--steps", "1200", "--lr_min", "0"])
    usual = [evidence.npp_schedule(step, cfg, 50) for step in (300, 900)]
    doubled = [evidence.doubled_on_patches(step, cfg, 50) for step in (300, 900)]
    assert doubled == [2 * usual[0], usual[1]]


def test_k_times_the_images_reads_each_batch_once():
    cfg = npp.Config(steps=10, patches=(2, 1))
    numbers = []
    for step in range(10):
        numbers += evidence.k_batches(step, cfg)
    assert numbers == list(range(5 * 4 + 5))
    assert evidence.mean_cost(evidence.K_TIMES) == pytest.approx((4 * 17 / 65 + 1) / 2)


# ---- the report


def test_the_report_says_lower_only_where_seeds_separate():
    a = {0: 1.0, 1: 2.0, 2: 3.0}
    less = {seed: x - 0.1 - seed / 1e3 for seed, x in a.items()}
    assert evidence.versus(less, a, 2).endswith("lower")
    assert evidence.versus(a, less, 2).endswith("higher")
    assert evidence.versus({0: 0.9, 1: 2.2, 2: 2.8}, a, 2).endswith("not separated")
    assert evidence.versus({0: 0.9}, a, 2) == "–"


def test_the_interval_is_students_of_paired_differences():
    # 4.303 is the 97.5 % quantile of Student's t with two degrees of freedom.
    half = 4.302653 * 1.0 / 3**0.5
    expected = f"+2.000 [{2 - half:+.3f}, {2 + half:+.3f}] not separated"
    assert evidence.interval([1.0, 2.0, 3.0], 3) == expected


def line(run, seed, loss, **more):
    """A line as run writes it, of the given loss"""
    steps = round(1200 * evidence.VARIANTS[run].share)
    values = {
        "run": run,
        "seed": seed,
        "size": "tiny",
        "grid_steps": 1200,
        "batch": 64,
        "images": 60_000,
        "dropout": 0.0,
        "lr": npp.TINY["lr"],
        "version": 2,
        "steps": steps,
        "cost": 1.0,
        "seconds": [1.0, 1.0],
        "val_loss": loss,
        "validation": [[600, loss + 0.1], [steps, loss]],
        "curve": [],
        "fixed": None,
        "sweep": {"2.0": 1.0},
        "samples_dtype": "float32",
        "chunk": 500,
        "machine": "a machine",
        "torch": "2",
    }
    values["best"] = {
        "guidance": 2.0,
        evidence.FD: loss / 4,
        "KID": 0.01,
        "precision": 0.9,
        "recall": 0.6,
        "class_accuracy": 0.95,
        "n": 5000,
        "real_against_real": 0.01,
    }
    values.update(more)
    return values


def write_lines(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_the_report_takes_the_papers_comparison_apart(tmp_path):
    path = tmp_path / "evidence.jsonl"
    losses = {"constant": 3.6, "plain": 3.4, "constant_2-1": 3.7, "2-1": 3.58}
    lines = []
    for run, loss in losses.items():
        for seed in (0, 1, 2):
            lines.append(line(run, seed, loss + seed / 1000))
    lines.append(line("constant", 0, 3.5, lr=0.004))
    lines.append(line("plain", 0, 3.5, images=6000))
    write_lines(path, lines)
    assert evidence.main(["report", "--results", str(path)]) == 0
    text = (tmp_path / "evidence.md").read_text()
    rows = {row.split(" | ")[0]: row for row in text.splitlines()}
    assert "-0.2000" in rows["| schedule: NPP's for the constant rate, next token"]
    assert "+0.1000" in rows["| patches: (2,1) for next token, constant rate"]
    assert "+0.0800" in rows["| interaction: both together, beyond the sum of the two"]
    assert "-0.0200" in rows["| total: (2,1) with NPP's schedule minus LlamaGen's recipe"]
    at_half_the_rate = rows["| next token, constant rate: LlamaGen's recipe, lr 0.004"]
    assert at_half_the_rate.endswith("| – | – |")
    assert rows["| next token, constant rate: LlamaGen's recipe"].endswith("| 5.46 | 3.8 |")
    assert f"They are {text.count(' [')};" in text
    assert "6,000 images" in text
    assert " p = 0" not in text
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_lines_of_earlier_runs_alone_make_a_report(tmp_path):
    with open(os.path.join(HERE, "evidence.jsonl")) as f:
        lines = [json.loads(text) for text in f]
    earlier = [x for x in lines if "version" not in x]
    path = tmp_path / "evidence.jsonl"
    write_lines(path, [x for x in earlier if x["grid_steps"] == 2400])
    assert evidence.main(["report", "--results", str(path)]) == 0
    text = (tmp_path / "evidence.md").read_text()
    assert "| next token, NPP's schedule | 3 | 1.000 | 851 ± 4 | 3.2639 ± 0.0019 |" in text
    assert (tmp_path / "evidence_tiny_2400_64.png").exists()


# ---- the command line


def test_lines_that_were_cut_are_named(tmp_path, capsys):
    path = tmp_path / "evidence.jsonl"
    path.write_text(json.dumps(line("plain", 0, 3.4)) + '\n{"run": "pl')
    assert evidence.main(["report", "--results", str(path)]) == 2
    assert f"{path}: not lines of JSON" in capsys.readouterr().err


def test_a_finished_run_is_skipped(tmp_path):
    path = tmp_path / "evidence.jsonl"
    write_lines(path, [line("plain", 7, 3.0, grid_steps=12)])
    before = path.read_bytes()
    command = ["run", "--only", "plain", "--seeds", "7", "--steps", "12"]
    places = ["--results", str(path), "--out", str(tmp_path / "out")]
    assert evidence.main(command + places) == 0
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("argv, words", [
    ("run --only plain,3-1", "only is plain,3-1"),
    ("run --seeds -1", "seeds is (-1,)"),
    ("run --size M", "size is M"),
    ("run --steps 3", "steps is 3"),
    ("run --images 70000", "images is 70000"),
    ("run --samples 20000", "samples is 20000"),
    ("report --only plain", "--only plain"),
    ("report --results none", "none: missing"),
    ("walk", "walk"),
])
def test_what_evidence_does_not_know_is_refused(capsys, argv, words):
    assert evidence.main(argv.split()) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
