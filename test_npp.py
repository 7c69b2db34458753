"""What npp.py claims, as tests: python -m pytest runs these and those of the other modules"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

import fid
import npp
import tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
FASHION = os.path.join(HERE, "data", "fashion")
PATCH_EDGES = (1, 2, 4)
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]

# ---- helpers ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden():
    """The official code's numbers for a random model of 2 layers: see data/golden/README.md"""
    with np.load(os.path.join(HERE, "data", "golden", "llamagen_tiny.npz")) as z:
        g = {k: torch.from_numpy(z[k]) for k in z}
    n_layer, n_head, dim, vocab, grid, classes = g["config"].tolist()
    model = npp.Transformer(n_layer, n_head, dim, vocab, classes, grid)
    model.load_state_dict({k[6:]: v for k, v in g.items() if k.startswith("model.")})
    return g, model.eval()


def small_model(vocab=11, classes=3, grid=4, seed=0, dim=32):
    torch.manual_seed(seed)
    model = npp.Transformer(2, 2, dim, vocab, classes, grid)
    torch.nn.init.normal_(model.output.weight, std=0.3)  # zero weights would hide every difference
    return model.eval()


def write_data(folder, images=96, vocab=16, grid=4, classes=3, views=2, **meta):
    """A data set without a tokenizer: codes that depend on the class and the position"""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=images)
    codes = labels[:, None, None] + np.arange(grid**2) + rng.integers(3, size=(images, views, 1))
    np.save(os.path.join(folder, "codes.npy"), (codes % vocab).astype(np.uint8))
    np.save(os.path.join(folder, "labels.npy"), labels)
    np.save(os.path.join(folder, "codes_val.npy"), (codes[:32] % vocab).astype(np.uint8))
    np.save(os.path.join(folder, "labels_val.npy"), labels[:32])
    meta = {"vocab": vocab, "grid": grid, "image_size": grid * 4, "tokenizer": None,
            "classes": [f"class {i}" for i in range(classes)], "tokenizer_sha256": None,
            "made_by": "a test", **meta}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def flags(**values):
    return [x for k, v in values.items() for x in (f"--{k}", str(v))]


SHORT = {"steps": 24, "batch": 8, "lr": 0.03, "log_every": 4, "eval_every": 8, "save_every": 6}


def train(data, out, **values):
    return npp.main(flags(data=data, out=out, **{**SHORT, **values}))


def start(data, out, *launcher, **values):
    """The same in a process of its own, which can be killed"""
    command = [sys.executable, *launcher, os.path.join(HERE, "npp.py")]
    return subprocess.Popen(command + flags(data=data, out=out, **{**SHORT, **values}),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def two_ranks(command, **how):
    """Two processes of a command, as torchrun starts them"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [subprocess.Popen(command, **how, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1"}) for rank in (0, 1)]


def weights(out, name="ckpt.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)["model"]


def log(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(x).items() if k != "img_s"} for x in f]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of SHORT, to be copied"""
    folder = tmp_path_factory.mktemp("trained")
    assert train(write_data(folder / "data"), folder / "run") == 0
    return folder / "run"


def unfinished(trained, out):
    """A run of SHORT that has reached its middle, where the stage of p = 2 has ended"""
    shutil.copytree(trained, out)
    os.remove(out / "ckpt_p1.pt")
    os.replace(out / "ckpt_p2.pt", out / "ckpt.pt")
    return str(out)


def wait_for_step(out, step, seconds=60):
    for _ in range(seconds * 20):
        path = os.path.join(out, "log.jsonl")
        if os.path.exists(path):
            with open(path) as f:
                if any(f'"step": {step},' in line for line in f):
                    return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {seconds} s")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()

# ---- 1. the method ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_patches_and_targets_equal_naive_loops(p):
    h = 8
    x, codes = torch.randn(2, h * h, 3), torch.arange(2 * h * h).view(2, h * h)
    averages, targets = npp.patchify(x, p), npp.patch_targets(codes, p)
    for b in range(2):
        for row in range(h // p):
            for column in range(h // p):
                block = [(row * p + i) * h + column * p + j for i in range(p) for j in range(p)]
                patch = row * (h // p) + column
                torch.testing.assert_close(averages[b, patch], x[b, block].mean(0))
                assert targets[b, patch].tolist() == codes[b, block].tolist()


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_loss_equals_cross_entropy_on_repeated_logits(p):
    torch.manual_seed(0)
    targets = torch.randint(7, (2, 4, p * p))
    logits = torch.randn(2, 4, 7)
    repeated = logits[:, :, None].expand(-1, -1, p * p, -1).reshape(-1, 7)
    torch.testing.assert_close(npp.npp_loss(logits, targets),
                               F.cross_entropy(repeated, targets.flatten()))


def test_p1_is_plain_next_token_prediction():
    model, codes, labels = small_model(), torch.randint(11, (3, 16)), torch.tensor([0, 1, 2])
    assert torch.equal(npp.patchify(torch.ones(1, 16, 2) * 0.3, 1), torch.ones(1, 16, 2) * 0.3)
    logits = model(codes, labels)
    torch.testing.assert_close(model.loss(codes, labels),
                               F.cross_entropy(logits.flatten(0, 1), codes.flatten()))


def test_stages_end_where_the_paper_says():
    spans = {(2, 1): [(2, 0, 50), (1, 50, 100)], (1,): [(1, 0, 100)],
             (4, 2, 1): [(4, 0, 25), (2, 25, 50), (1, 50, 100)],
             (8, 4, 2, 1): [(8, 0, 12), (4, 12, 25), (2, 25, 50), (1, 50, 100)]}
    for patches, expected in spans.items():
        for p, first, end in expected:
            for step in (first, end - 1):
                assert npp.stage(step, 100, patches, 0.5) == (p, first, end)
    assert npp.stage(79, 100, (2, 1), 0.8)[0] == 2 and npp.stage(80, 100, (2, 1), 0.8)[0] == 1


def test_learning_rate_at_every_boundary():
    def lr(step, warmup=5, patches=(2, 1)):
        return npp.lr_at(step, 200, patches, 0.5, 1.0, 0.1, warmup, 0.2)

    for first in (0, 100):  # each stage afresh
        assert [lr(first + i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
        assert lr(first + 80) == pytest.approx(1.0)
        assert lr(first + 90) == pytest.approx(0.1 + 0.9 / 2)
        assert lr(first + 99) == pytest.approx(0.1 + 0.9 / 20)
    assert lr(0, warmup=1000) == pytest.approx(0.1)  # at most a tenth of the stage, 10 steps
    assert lr(9, warmup=1000) == lr(10, warmup=1000) == 1.0
    assert lr(0, warmup=0) == 1.0
    assert lr(100, patches=(1,)) == 1.0


def test_a_decay_never_rises():
    rates = [npp.lr_at(step, 200, (2, 1), 0.5, 1e-6, 1e-5, 5, 0.2) for step in range(200)]
    assert max(rates) == rates[99] == 1e-6


def test_rotary_scores_depend_on_relative_positions_only():
    h, rope = 6, npp.rope_2d(6, 16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a, b):
        turned = [npp.rotate(x, rope[1 + r * h + c][None]) for x, (r, c) in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((0, 1), (2, 3)), score((3, 2), (5, 4)))
    assert (score((0, 1), (2, 3)) - score((0, 1), (3, 2))).abs() > 1e-3
    assert rope.shape == (1 + h * h, 8, 2) and rope[0].abs().max() == 0

# ---- 2. the official code -----------------------------------------------------------------------


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_logits_loss_gradient_and_rope_equal_the_official_code(golden, p):
    g, model = golden
    logits = model(g["codes"], g["labels"], p)
    expected = g[f"logits_p{p}"].reshape(logits.shape) if p == 1 else (
        g[f"logits_p{p}"][:, 0].reshape(logits.shape))  # the official ones are repeated K times
    assert relative(logits, expected) < 1e-5
    model.zero_grad()
    loss = model.loss(g["codes"], g["labels"], p)
    loss.backward()
    norm = torch.stack([w.grad.norm() for w in model.parameters()]).norm()
    assert loss.item() == pytest.approx(g[f"loss_p{p}"].item(), rel=1e-5)
    assert norm.item() == pytest.approx(g[f"gradnorm_p{p}"].item(), rel=1e-5)
    assert relative(npp.rope_2d(model.grid // p, model.head_dim), g[f"rope_p{p}"]) < 1e-5


@pytest.mark.parametrize("scale", (1, 2))
def test_greedy_samples_equal_the_official_code(golden, scale):
    g, model = golden
    codes = npp.generate(model, g["labels"], cfg_scale=scale, top_k=1)
    assert torch.equal(codes, g[f"greedy_cfg{scale}"].long())


def test_sizes_have_the_published_numbers_of_parameters():
    millions = {"B": 110.888, "L": 342.9, "XL": 774.7, "XXL": 1411.0, "3B": 3096.7}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = npp.Transformer(**npp.SIZES[name], vocab=16384, classes=1000, grid=16)
        count = sum(w.numel() for w in model.parameters())
        assert count / 1e6 == pytest.approx(expected, abs=0.05)

# ---- 3. the transformer -------------------------------------------------------------------------


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_no_gradient_reaches_the_future(p):
    model, codes, labels = small_model(grid=8), torch.randint(11, (1, 64)), torch.tensor([1])
    embedded = model.tok_embeddings(codes).detach().requires_grad_()
    model.tok_embeddings.forward = lambda _: embedded
    for i in range(64 // p**2):
        loss = model(codes, labels, p)[0, i].logsumexp(0)
        (gradient,) = torch.autograd.grad(loss, embedded)
        seen = npp.patchify(gradient.abs(), p).sum(-1)[0] > 0
        assert seen[:i].all() and not seen[i:].any()


@torch.no_grad()
@pytest.mark.parametrize("p", (1, 2))
def test_cached_logits_equal_uncached(p):
    model, codes, labels = small_model(), torch.randint(11, (3, 16)), torch.tensor([0, 1, 3])
    positions = 16 // p**2
    x = model.embed_patches(codes, p)
    x = torch.cat([model.embed_class(labels), x[:, :-1]], dim=1)
    rope = npp.rope_2d(4 // p, model.head_dim)
    caches = [npp.KVCache(3, 2, positions, model.head_dim, like=x) for _ in model.layers]
    filled = [positions // 2] * (positions // 2) + [positions] * (positions // 2)  # as in a graph
    steps = [model.next_logits(x[:, i : i + 1], rope[i : i + 1], caches, torch.tensor([i]),
                               torch.arange(filled[i])[None] <= i) for i in range(positions)]
    torch.testing.assert_close(torch.stack(steps, dim=1), model(codes, labels, p))


def test_first_loss_is_the_log_of_the_vocabulary():
    model = npp.Transformer(2, 2, 32, 50, 3, 4)
    loss = model.loss(torch.randint(50, (2, 16)), torch.tensor([0, 1]), 2)
    assert loss.item() == pytest.approx(math.log(50), abs=1e-6)


def test_dropout_acts_in_training_only_and_never_on_labels():
    model = npp.Transformer(2, 2, 32, 11, 3, 4, dropout=0.5)
    torch.nn.init.normal_(model.output.weight)
    batch = torch.randint(11, (2, 16)), torch.tensor([0, 1])
    assert not torch.equal(model.train()(*batch), model(*batch))
    assert torch.equal(model.eval()(*batch), model(*batch))
    without = small_model().train()
    assert torch.equal(without(*batch), without(*batch))


def test_bfloat16_weights_keep_a_float32_rope():
    model, batch = small_model(), (torch.randint(11, (2, 16)), torch.tensor([0, 1]))
    exact = model(*batch)
    rounded = model.bfloat16()(*batch)
    assert rounded.dtype == torch.float32 and relative(rounded, exact) < 0.05

# ---- 4. sampling --------------------------------------------------------------------------------


def test_codes_follow_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    u = torch.tensor([[0.0, 0.49, 0.51, 0.76, 1 - 2**-24]])
    assert npp.choose(logits, u).tolist() == [[0, 0, 1, 2, 2]]
    counts = torch.bincount(npp.choose(logits, torch.rand(1, 20000))[0]) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize("u", (0.0, 0.5, 1 - 2**-24))
def test_filters_keep_only_the_likeliest_codes(u):
    logits = torch.tensor([[0.05, 0.5, 0.05, 0.3, 0.1]]).log()
    u = torch.tensor([[u]])
    assert npp.choose(logits, u, top_k=1).item() == 1
    assert npp.choose(logits, u, top_k=2).item() in (1, 3)
    assert npp.choose(logits, u, top_p=0.4).item() == 1  # the code that crosses top_p stays
    assert npp.choose(logits, u, top_p=0.6).item() in (1, 3)
    assert npp.choose(logits, u, temperature=0).item() == 1


@pytest.mark.parametrize("p", (1, 2))
def test_top_k_1_is_argmax_at_every_position(p):
    model, labels = small_model(), torch.tensor([0, 1, 2])
    codes = npp.generate(model, labels, top_k=1, p=p)
    likeliest = model(codes, labels, p).argmax(-1, keepdim=True)
    assert torch.equal(npp.patch_targets(codes, p), likeliest.expand(-1, -1, p * p))


def test_guidance_1_is_conditional_and_0_unconditional():
    model, labels, noise = small_model(), torch.tensor([0, 1, 2]), torch.rand(3, 16)
    plain = npp.generate(model, labels, noise=noise)
    near = npp.generate(model, labels, cfg_scale=1 + 1e-7, noise=noise)  # by way of two batches
    none = npp.generate(model, labels, cfg_scale=0, noise=noise)
    null = npp.generate(model, torch.full_like(labels, model.classes), noise=noise)
    assert torch.equal(plain, near) and torch.equal(none, null) and not torch.equal(plain, null)


def test_an_image_does_not_depend_on_its_batch():
    model, labels = small_model(), torch.tensor([0, 1, 2, 0])
    noise = npp.noise_of(7, range(4), 16)
    together = npp.generate(model, labels, cfg_scale=2, noise=noise)
    for i in range(4):
        alone = npp.generate(model, labels[i : i + 1], cfg_scale=2, noise=npp.noise_of(7, [i], 16))
        assert torch.equal(alone[0], together[i])


@pytest.mark.slow  # half a minute of compiling, by a C++ compiler that must be there
@pytest.mark.parametrize("p", (1, 2))
def test_compiled_sampling_gives_the_same_codes_for_every_batch(p):
    torch._dynamo.reset()
    model, labels = small_model(), torch.tensor([0, 1])
    cached = npp.CompiledModel(model, 4, p)
    for _ in range(2):
        noise = torch.rand(2, 16)
        assert torch.equal(npp.generate(model, labels, 2.0, noise=noise, p=p, cached=cached),
                           npp.generate(model, labels, 2.0, noise=noise, p=p))


def test_sampling_works_under_autocast():
    model, labels, noise = small_model(), torch.tensor([0, 1]), torch.rand(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        codes = npp.generate(model, labels, 2.0, noise=noise)
    assert codes.shape == (2, 16)


def test_logits_that_are_no_numbers_are_refused():
    model = small_model()
    model.output.weight.data[0, 0] = math.nan
    with pytest.raises(npp.BadInput, match="NaN"):
        npp.generate(model, torch.tensor([0, 1]))


def test_patchwise_sampling_draws_every_code_of_a_patch_from_one_distribution():
    model, labels = small_model(), torch.tensor([0, 1])
    noise = torch.rand(2, 4)
    noise = noise.view(2, 2, 1, 2, 1).expand(2, 2, 2, 2, 2).reshape(2, 16)  # equal in each patch
    codes = npp.patch_targets(npp.generate(model, labels, noise=noise, p=2), 2)
    assert (codes == codes[..., :1]).all() and len(codes.unique()) > 1

# ---- 5. data ------------------------------------------------------------------------------------


def test_an_epoch_visits_every_image_once(data):
    codes, cfg = npp.Codes(data), npp.Config(batch=36, class_dropout=0)  # 96 images
    order = [npp.epoch_order(96, 0, epoch) for epoch in range(3)]
    where = np.concatenate(order)
    for step in range(8):
        labels = npp.batch_at(codes, step, cfg)[1]
        assert labels.tolist() == codes.labels[where[step * 36 : step * 36 + 36]].tolist()
    assert sorted(order[0]) == list(range(96)) and not np.array_equal(order[0], order[1])


def test_batches_do_not_depend_on_ranks(data):
    codes, cfg = npp.Codes(data), npp.Config(batch=12)
    whole = npp.batch_at(codes, 5, cfg)
    parts = [npp.batch_at(codes, 5, cfg, slice(r * 4, r * 4 + 4)) for r in range(3)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert not torch.equal(whole[0], npp.batch_at(codes, 5, npp.Config(batch=12, seed=1))[0])


def test_views_and_null_labels_are_drawn_at_random(data):
    codes, cfg = npp.Codes(data), npp.Config(batch=4000)
    batch, labels = npp.batch_at(codes, 0, cfg)
    assert (labels == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    index = np.concatenate([npp.epoch_order(96, 0, e) for e in range(42)])[:4000]
    first = (batch.numpy() == codes.codes[index, 0]).all(1)
    assert 0.4 < first.mean() < 0.75  # a third of the images have two equal views

# ---- 6. training --------------------------------------------------------------------------------


def test_a_run_leaves_logs_checkpoints_and_no_rubbish(data, tmp_path):
    out = str(tmp_path / "run")
    assert train(data, out) == 0
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_p1.pt", "ckpt_p2.pt", "lock", "log.jsonl"]
    lines = log(out)
    assert [x["step"] for x in lines] == [4, 6, 8, 12, 16, 18, 20, 24]
    assert [x["p"] for x in lines] == [2] * 4 + [1] * 4
    assert [x["step"] for x in lines if "val_loss" in x] == [8, 12, 16, 24]
    assert lines[0]["loss"] == pytest.approx(math.log(16), abs=0.2) and lines[-1]["loss"] < 2
    assert same(weights(out), weights(out, "ckpt_p1.pt"))


def test_one_image_can_be_learned_by_heart(tmp_path):
    data, out = write_data(tmp_path / "one", images=1, views=1), str(tmp_path / "run")
    assert train(data, out, steps=200, batch=8, lr=0.15, class_dropout=0.0, save_every=200) == 0
    assert log(out)[-1]["loss"] < 0.01
    codes = npp.Codes(data)
    model = npp.load_model(os.path.join(out, "ckpt.pt"))
    drawn = npp.generate(model, torch.from_numpy(codes.labels[:1].copy()))
    assert drawn[0].tolist() == codes.codes[0, 0].tolist()


def test_killed_and_resumed_is_bit_identical(data, tmp_path):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    recipe = {"steps": 60, "dropout": 0.1}
    for step in (8, 40):  # once in each stage, off the checkpoints at multiples of 6
        process = start(data, broken, **recipe)
        wait_for_step(broken, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert train(data, broken, **recipe) == 0 == train(data, whole, **recipe)
    for name in ("ckpt_p2.pt", "ckpt_p1.pt", "ckpt.pt"):
        assert same(weights(whole, name), weights(broken, name))
    assert log(whole) == log(broken)


def test_signals_save_before_the_end(data, tmp_path):
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = str(tmp_path / str(number))
        runs[number, out] = start(data, out, steps=4000, save_every=4000, eval_every=4000)
    for (number, out), process in runs.items():
        wait_for_step(out, 8)
        process.send_signal(number)
        assert process.wait(60) == 130, process.stderr.read()
        state = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        assert state["step"] >= 8 and "goes on from there" in process.stdout.read()


def test_two_ranks_and_accumulation_train_as_one(data, tmp_path):
    outs = {name: str(tmp_path / name) for name in ("one", "two", "micro")}
    process = start(data, outs["two"], *TWO_RANKS, micro_batch=2)
    assert train(data, outs["one"]) == 0 == train(data, outs["micro"], micro_batch=2)
    assert process.wait(120) == 0, process.stderr.read()
    for name in ("two", "micro"):
        for a, b in zip(log(outs["one"]), log(outs[name])):
            assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        first = [weights(outs[x], "ckpt_p2.pt")["tok_embeddings.weight"] for x in ("one", name)]
        assert relative(*first) < 1e-2  # Adam divides tiny gradients by themselves


def test_a_finished_run_says_so_and_another_recipe_is_refused(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train(data, out, steps=4) == 0
    before = weights(out)
    assert train(data, out, steps=4, micro_batch=4, log_every=1) == 0
    assert "is finished" in capsys.readouterr().out
    assert train(data, out, steps=4, lam=0.25, seed=3) == 2
    message = capsys.readouterr().err
    assert "lam is 0.5 there, 0.25 here" in message and "seed is 0 there, 3 here" in message
    assert same(before, weights(out))


def test_fine_tuning_starts_from_given_weights(data, tmp_path):
    out = str(tmp_path / "run")
    assert train(data, out) == 0
    other = write_data(tmp_path / "other", classes=5)
    tuned = str(tmp_path / "tuned")
    assert train(other, tuned, init=os.path.join(out, "ckpt.pt"), steps=2, lr=0.0, lr_min=0.0) == 0
    a, b = weights(out), weights(tuned)
    assert torch.equal(a["layers.0.attention.wo.weight"], b["layers.0.attention.wo.weight"])
    assert b["cls_embedding.embedding_table.weight"].shape[0] == 6
    assert train(data, out, init="w.pt") == 2  # a run that did not start from weights is another


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train(data, out, lr=1e30, clip=1e30, save_every=100, log_every=4) == 2
    assert "the loss is nan at step" in capsys.readouterr().err
    assert all(w.isfinite().all() for w in weights(out).values())


def test_a_full_disk_leaves_the_old_checkpoint_and_is_named(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    before = weights(out)
    program = ("import resource, sys, npp\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
               "sys.exit(npp.main(sys.argv[1:]))")
    command = [sys.executable, "-c", program, *flags(data=data, out=out, **SHORT)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "ckpt.pt: cannot be written" in done.stderr
    assert same(before, weights(out)) and not os.path.exists(out + "/ckpt.pt.part")


def test_two_trainings_of_one_folder_are_refused(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    process = start(data, out, steps=4000)
    wait_for_step(out, 8)
    refuses(capsys, flags(data=data, out=out, **{**SHORT, "steps": 4000}), "in use")
    process.kill()
    process.communicate()
    assert train(data, out, steps=4000, lam=0.25) == 2      # the lock has ended with its process
    assert "lam is 0.5 there" in capsys.readouterr().err


def test_a_closed_pipe_saves_before_the_end(data, tmp_path):
    out = str(tmp_path / "run")
    process = start(data, out, steps=4000, save_every=4000, eval_every=4000)
    process.stdout.readline()
    process.stdout.close()                                  # as head -1 does
    assert process.wait(60) == 130, process.stderr.read()
    assert torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)["step"] > 0


def test_a_second_signal_ends_training_at_once(data, tmp_path):
    program = """import os, signal, sys, time, npp
signal.signal(signal.SIGTERM, npp.interrupt)
step = npp.Watcher.after_step
def slow(self, *rest):                    # a step that takes for ever, as compiling might
    print("in a step", flush=True)
    time.sleep(60)
npp.Watcher.after_step = slow
sys.exit(npp.main(sys.argv[1:]))"""
    command = [sys.executable, "-c", program, *flags(data=data, out=tmp_path / "run", **SHORT)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while "in a step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)                                         # sooner it might be torchrun's echo
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert process.stderr.read() == "npp.py: stopped\n"


def test_a_signal_while_sampling_leaves_one_line_and_no_file(published, tmp_path):
    _, weights, vq = published
    out = str(tmp_path / "s.npz")
    command = [sys.executable, os.path.join(HERE, "npp.py"), *flags(
        sample=weights, tokenizer=vq, image_size=32, n=100_000, micro_batch=2, out=out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    assert os.path.exists(out + ".part")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "npp.py: stopped\n")
    assert not os.path.exists(out + ".part") and not os.path.exists(out)


def test_resume_needs_nothing_but_the_checkpoint(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    with open(os.path.join(out, "log.jsonl"), "wb") as f:
        f.write(b'{"step": 4, "p": 2}\n{"step": 4}{"step": 8}\n\0\0\0\n{"p": 2}\n[]\n{"step": 1')
    assert train(data, out) == 0
    assert [x["step"] for x in log(out)] == [4, 16, 18, 20, 24]
    out = unfinished(trained, tmp_path / "other")
    os.remove(os.path.join(out, "log.jsonl"))
    assert train(data, out) == 0


def test_a_finished_run_is_not_touched(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train(data, out, steps=4) == 0

    def times():
        return {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in os.listdir(out)}

    before = times()
    assert train(data, out, steps=4) == 0
    assert "is finished" in capsys.readouterr().out and before == times()


def test_an_older_checkpoint_that_lacks_a_flag_still_resumes(trained, data, tmp_path, capsys):
    out = unfinished(trained, tmp_path / "run")
    path = os.path.join(out, "ckpt.pt")
    saved = torch.load(path, weights_only=True)
    del saved["config"]["clip"]
    torch.save(saved, path)
    assert train(data, out, clip=2) == 2                    # its default was 1
    assert "clip is 1.0 there, 2.0 here" in capsys.readouterr().err
    assert train(data, out) == 0


# ---- 7. bad input: one line, exit code 2 --------------------------------------------------------

def refuses(capsys, arguments, *words, main=npp.main):
    assert main(arguments) == 2
    out, message = capsys.readouterr()
    assert message.count("\n") == 1, message
    for word in words:
        assert word in message, message
    return out, message


@pytest.mark.parametrize("values, word", [
    ({"model": "M"}, "model is M"), ({"patches": "1,2"}, "patches is (1, 2)"),
    ({"patches": "4,2"}, "decrease to 1"), ({"patches": "3,1"}, "divisors"),
    ({"patches": "x"}, "patches"), ({"lam": 1}, "lam is 1.0"), ({"lam": 0}, "lam is 0.0"),
    ({"micro_batch": 3}, "batch is 8"), ({"batch": 0}, "batch is 0"), ({"lr": "fast"}, "lr"),
    ({"steps": -1}, "steps is -1"), ({"dtype": "float8"}, "dtype is float8"),
    ({"stepz": 3}, "stepz"), ({"data": "none"}, "none/meta.json"), ({"seed": -1}, "seed is -1"),
    ({"log_every": 0}, "log_every is 0"), ({"micro_batch": -1}, "micro_batch is -1"),
    ({"epochs": "nan"}, "epochs is nan"), ({"lr": -1}, "lr is -1"), ({"clip": 0}, "clip is 0"),
    ({"save_every": 0}, "save_every is 0"), ({"sample": "c.pt", "micro_batch": -1}, "micro_batch"),
    ({"sample": "c.pt", "dtype": "float8"}, "dtype is float8, expected float32, bfloat16"),
    ({"sample": "c.pt", "top_p": 0}, "top_p is 0"), ({"class_dropout": 2}, "class_dropout is 2"),
    ({"dropout": 1.5}, "dropout is 1.5"), ({"tokenizer": "no.pt"}, "no.pt"),
    ({"classes": "class 9"}, "class 9"), ({"init": "no.pt"}, "no.pt"),
    ({"seed": 10**30}, "seed is 1000"), ({"batch": 2**63}, "batch is 9223"),
    ({"lr": "inf"}, "lr is inf"), ({"patches": "4,2,1", "steps": 2}, "none is left for p = 4"),
    ({"steps": 4, "lam": 0.99}, "none is left for p = 1"), ({"out": "a\nb/c", "seed": -1}, "seed"),
    ({"data": "no\nfolder"}, "no folder/meta.json"), ({"patches": "0,1"}, "patches is (0, 1)"),
    ({"sample": "c.pt", "cfg_scale": "nan"}, "cfg_scale is nan"),
    ({"sample": "c.pt", "cfg_scale": "inf"}, "cfg_scale is inf"),
    ({"sample": "c.pt", "top_p": 1.5}, "top_p is 1.5"),
    ({"sample": "c.pt", "n": 10**30}, "n is 1000"),
])
def test_a_bad_flag_is_named(data, tmp_path, capsys, values, word):
    out = tmp_path / "run"
    refuses(capsys, flags(**{"data": data, "out": out, **SHORT, **values}), word)
    assert not out.exists()


def test_more_processes_than_gpus_are_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuses(capsys, flags(data=data, out=tmp_path / "run", **SHORT), "2 processes", "GPU: 1")


@pytest.mark.parametrize("name, damage, words", [
    ("codes.npy", None, ("missing",)),
    ("codes.npy", b"\x93NUMPY\x01", ("damaged",)),
    ("codes.npy", np.zeros((96, 2, 16), np.int64), ("int64", "uint8 or uint16")),
    ("codes.npy", np.zeros((96, 2, 16), ">u2"), (">u2", "uint8 or uint16")),
    ("codes.npy", np.zeros((0, 2, 16), np.uint8), ("(0, 2, 16)",)),
    ("codes.npy", np.zeros((96, 16), np.uint8), ("(96, 16)", "(images, views, 16)")),
    ("codes.npy", np.zeros((96, 2, 15), np.uint8), ("(96, 2, 15)",)),
    ("codes.npy", np.full((96, 2, 16), 16, np.uint8), ("image ", "code 16", "0 to 15")),
    ("codes_val.npy", np.full((32, 2, 16), 17, np.uint8), ("image 0", "code 17", "0 to 15")),
    ("labels.npy", np.full(96, 3), ("3 to 3", "0 to 2")),
    ("labels.npy", np.full(96, -1), ("-1 to -1",)),
    ("labels.npy", np.zeros(95, np.int64), ("(95,)", "(96,)")),
    ("codes_val.npy", np.zeros((32, 2, 9), np.uint8), ("(32, 2, 9)",)),
    ("meta.json", None, ("meta.json",)),
    ("meta.json", b"{", ("meta.json",)),
    ("meta.json", b'{"vocab": 16}', ("grid",)),
    ("meta.json", b'{"vocab": 16, "grid": "4", "image_size": 16, "classes": ["a"], '
                  b'"tokenizer": null, "tokenizer_sha256": null}', ("grid is 4",)),
    ("meta.json", b"[" * 100_000, ("RecursionError",)),
    ("meta.json", b'{"vocab": 16, "grid": 4.0, "image_size": 16, "classes": ["a"]}', ("is 4.0",)),
    ("meta.json", b'{"vocab": 16, "grid": 4, "image_size": 16, "classes": "abc"}', ("classes",)),
    ("meta.json", b'{"vocab": 16, "grid": 4, "image_size": 16, "classes": [1, 2]}', ("classes",)),
    ("labels.npy", np.full(96, 0.5), ("float64",)),
])
def test_bad_data_is_named(data, tmp_path, capsys, name, damage, words):
    path = os.path.join(data, name)
    os.remove(path)
    if isinstance(damage, bytes):
        with open(path, "wb") as f:
            f.write(damage)
    elif damage is not None:
        np.save(path, damage)
    refuses(capsys, flags(data=data, out=tmp_path / "run", **SHORT), name, *words)


def test_an_error_of_the_second_rank_is_named_and_both_end(data, tmp_path):
    path = os.path.join(data, "codes.npy")
    codes = np.load(path)
    codes[npp.epoch_order(96, 0, 0)[4:8]] = 255             # the second rank's share of step 0
    np.save(path, codes)
    command = [sys.executable, os.path.join(HERE, "npp.py"),
               *flags(data=data, out=tmp_path / "run", **SHORT)]
    ranks = two_ranks(command, stderr=subprocess.PIPE, text=True)
    errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert "code 255, expected 0 to 15" in errors[1] and errors[1].count("npp.py:") == 1
    assert "npp.py: another rank has ended" in errors[0]


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_bad_checkpoints_are_refused_and_run_no_code(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, path = str(tmp_path / "run"), str(tmp_path / "run" / "ckpt.pt")
    assert train(data, out, steps=4) == 0
    with open(path, "rb") as f:
        whole = f.read()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps({"model": Evil()})):
        with open(path, "wb") as f:
            f.write(content)
        refuses(capsys, flags(data=data, out=out, **{**SHORT, "steps": 8}), "ckpt.pt")
        refuses(capsys, ["--sample", path], "ckpt.pt")
        with open(path, "rb") as f:
            assert f.read() == content  # and nothing is lost
    assert not os.path.exists("hacked")
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(3, 4)}}, path)
    refuses(capsys, ["--sample", path], "expected a transformer")
    refuses(capsys, flags(data=data, out=out, **SHORT), "expected a checkpoint of npp.py")


def test_a_flipped_bit_in_a_checkpoint_is_found(trained, data, tmp_path, capsys):
    out = unfinished(trained, tmp_path / "run")
    path = os.path.join(out, "ckpt.pt")
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))
    refuses(capsys, flags(data=data, out=out, **SHORT), "ckpt.pt", "damaged")
    refuses(capsys, ["--sample", path], "ckpt.pt", "damaged")


@pytest.mark.parametrize("change", [
    lambda saved: saved.pop("step"), lambda saved: saved.update(step="x"),
    lambda saved: saved.update(step=1000), lambda saved: saved.update(step=-1),
    lambda saved: saved.pop("model"), lambda saved: saved.pop("optimizer"),
    lambda saved: saved.update(config=3), lambda saved: saved["optimizer"].pop("param_groups"),
    lambda saved: saved["optimizer"].update(state={}),
    lambda saved: saved["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda saved: saved["model"].pop("norm.weight"),
])
def test_a_checkpoint_with_wrong_contents_is_refused(trained, data, tmp_path, capsys, change):
    out = unfinished(trained, tmp_path / "run")
    path = os.path.join(out, "ckpt.pt")
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    refuses(capsys, flags(data=data, out=out, **SHORT), "ckpt.pt: expected a checkpoint of npp.py")


@pytest.mark.parametrize("change, word", [
    (lambda saved: saved.update(grid=-4), "grid"), (lambda saved: saved.update(grid="x"), "grid"),
    (lambda saved: saved.update(grid=4.5), "grid"),
    (lambda saved: saved.update(classes=None), "None"),
    (lambda saved: saved.update(classes=["a"] * 9), "9 names of 3 classes"),
    (lambda saved: saved["config"].update(model="M"), "'M'"),
    (lambda saved: saved["model"].pop("layers.3.attention.wo.weight"), "layers.3.attention.wo"),
    (lambda saved: saved["model"]["norm.weight"].fill_(math.nan), "norm.weight holds NaN"),
])
def test_a_checkpoint_that_cannot_be_sampled_is_refused(trained, tmp_path, capsys, change, word):
    path = str(tmp_path / "ckpt.pt")
    saved = torch.load(trained / "ckpt.pt", weights_only=True)
    change(saved)
    torch.save(saved, path)
    refuses(capsys, ["--sample", path], "ckpt.pt", word)


def test_weights_of_another_shape_are_refused(data, tmp_path, capsys):
    path = str(tmp_path / "other.pt")
    model = npp.Transformer(4, 4, 128, vocab=20, classes=3, grid=4)  # 20 codes, where data have 16
    torch.save({"model": model.state_dict()}, path)
    refuses(capsys, flags(data=data, out=tmp_path / "run", init=path, **SHORT), "size mismatch")
    assert not os.path.exists(tmp_path / "run")


def test_codes_of_another_tokenizer_are_refused(tmp_path, capsys):
    model = tokenizer.VQModel(16, 8, 32, (1, 1, 1), 32)
    data = write_data(tmp_path / "data", tokenizer="tokenizer.pt", tokenizer_sha256="0" * 64)
    tokenizer.save_tokenizer(os.path.join(data, "tokenizer.pt"), model)
    refuses(capsys, flags(data=data, out=tmp_path / "run", **SHORT), "sha256", "0000")

# ---- 8. published weights, and samples at scale -------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """Weights as LlamaGen publishes them, which tell neither heads nor grid, and a tokenizer"""
    model = small_model(vocab=32, classes=5, dim=128)
    paths = str(tmp_path / "c2i.pt"), str(tmp_path / "vq.pt")
    torch.save({"model": model.state_dict()}, paths[0])
    tokenizer.save_tokenizer(paths[1], tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32))
    return model, *paths


@pytest.mark.parametrize("layout", ("model", "module", "state_dict", None))
def test_published_weights_load_from_every_layout(published, tmp_path, layout):
    model, path = published[0], str(tmp_path / "other.pt")
    args = argparse.Namespace(gpt_model="GPT-B")  # training checkpoints of LlamaGen carry one
    torch.save({layout: model.state_dict(), "args": args} if layout else model.state_dict(), path)
    loaded = npp.load_model(path, grid=6)
    assert loaded.n_head == 2 and loaded.grid == 6 and not loaded.training
    assert same(loaded.state_dict(), model.state_dict())


def test_heads_follow_from_the_width(tmp_path):
    for name, size in npp.SIZES.items():
        with torch.device("meta"):
            model = npp.Transformer(1, 1, size["dim"], 16, 3, 4)
        state = {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / "one.pt")  # a single number, seen in every place
        if name != "tiny":
            assert npp.load_model(tmp_path / "one.pt").n_head == size["n_head"]


def test_published_weights_sample_without_a_data_set_at_any_size(published, tmp_path):
    _, weights, vq = published
    args = flags(sample=weights, tokenizer=vq, data="none", image_size=24, n=5, classes="4,2")
    for name, size in (("a", 0), ("b", 16)):
        out = str(tmp_path / f"{name}.npz")
        assert npp.main([*args, *flags(out=out, image_size_eval=size)]) == 0
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert a["arr_0"].shape == (5, 24, 24, 3) and a["labels"].tolist() == [4, 2, 4, 2, 4]
    codes = npp.generate(npp.load_model(weights, grid=6), torch.from_numpy(a["labels"]), 2.0,
                         noise=npp.noise_of(0, range(5), 36))
    images = tokenizer.load_tokenizer(vq).decode(codes.view(5, 6, 6))
    assert np.array_equal(a["arr_0"], tokenizer.to_uint8(images))
    images = F.interpolate(images, (16, 16), mode="bicubic")  # before rounding, as LlamaGen does
    assert np.array_equal(b["arr_0"], tokenizer.to_uint8(images))
    assert npp.main([*args, *flags(out=tmp_path / "grid.png")]) == 0


@pytest.mark.parametrize("values, words", [
    ({"image_size": 2}, ["image_size is 2", "expected 4"]),
    ({"image_size": 25}, ["image_size is 25", "expected 24"]),
    ({"image_size_eval": -1}, ["image_size_eval is -1"]),
    ({"out": "samples.jpg"}, ["samples.jpg", "expected a .png or an .npz"]),
    ({"classes": "5"}, ["classes is 5", "0 to 4"]),
    ({"tokenizer": ""}, ["c2i.pt", "--tokenizer"]),
    ({"sample": "vq.pt"}, ["vq.pt", "expected a transformer"]),
])
def test_what_cannot_be_sampled_is_refused(published, tmp_path, capsys, monkeypatch, values, words):
    monkeypatch.chdir(tmp_path)
    given = {"sample": "c2i.pt", "tokenizer": "vq.pt", "image_size": 24, "out": "x.npz", **values}
    refuses(capsys, flags(**given), *words)
    assert not os.path.exists("x.npz")


def test_any_number_of_ranks_makes_the_same_samples(published, tmp_path):
    _, weights, vq = published
    args = flags(sample=weights, tokenizer=vq, image_size=16, n=11, micro_batch=3)
    outs = [str(tmp_path / f"{ranks}.npz") for ranks in (1, 2)]
    two = subprocess.run([sys.executable, *TWO_RANKS, os.path.join(HERE, "npp.py"), *args,
                          "--out", outs[1]], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=90)
    assert two.returncode == 0 == npp.main([*args, "--out", outs[0]])
    with open(outs[0], "rb") as a, open(outs[1], "rb") as b:
        assert len(np.load(outs[0])["arr_0"]) == 11 and a.read() == b.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="lists threads as Linux does")
def test_ranks_end_without_threads(published, tmp_path):
    """A thread of gloo that is left wakes as Python ends, and aborts the process now and then"""
    _, weights, vq = published
    code = """import pathlib, sys, npp; npp.main(sys.argv[1:])
print("threads:", *(x.read_text() for x in pathlib.Path("/proc/self/task").glob("*/comm")))"""
    args = flags(sample=weights, tokenizer=vq, image_size=16, n=4, out=tmp_path / "x.npz")
    for rank in two_ranks([sys.executable, "-c", code, *args], cwd=HERE, stdout=subprocess.PIPE,
                          text=True):
        out = rank.communicate(timeout=90)[0]
        assert "threads:" in out and "gloo" not in out


def test_samples_are_balanced_or_random_by_seed_and_index(published, tmp_path):
    _, weights, vq = published
    def labels(**values):
        out = str(tmp_path / "x.npz")
        assert npp.main(flags(sample=weights, tokenizer=vq, image_size=4, out=out, **values)) == 0
        return np.load(out)["labels"].tolist()
    assert np.bincount(labels(n=10)).tolist() == [2] * 5
    random = labels(n=10, classes="random")
    assert random == labels(n=20, classes="random")[:10] != labels(n=10)
    assert random != labels(n=10, classes="random", seed=1)


def test_readme_quotes_the_code_and_links_to_files_that_are_there():
    with open(os.path.join(HERE, "README.md")) as f:
        text = f.read()
    with open(os.path.join(HERE, "npp.py")) as f:
        code = f.read()
    quotes = re.findall(r"```python\n(.*?)```", text, re.S)
    assert quotes and all(quote in code for quote in quotes)
    for link in re.findall(r"\]\((?!http|#)(.*?)\)", text):
        assert os.path.exists(os.path.join(HERE, link.split("#")[0])), link

# ---- 9. speed that can be checked without a clock -----------------------------------------------


def prepared(device="cpu"):
    """-> model, optimizer, batch of a short training on 8 x 8 codes"""
    cfg = npp.Config(model="tiny", batch=4)
    meta = {"vocab": 11, "grid": 8, "classes": ["a", "b", "c"]}
    model, optimizer = npp.build(cfg, meta, torch.device(device))
    return model, optimizer, (torch.randint(11, (4, 64)), torch.randint(3, (4,)))


@pytest.mark.slow
def test_each_patch_size_is_compiled_once_and_whole():
    torch._dynamo.reset()
    graphs = CompileCounter()
    model, optimizer, batch = prepared()
    loss_of = torch.compile(npp.Loss(model), backend=graphs, dynamic=False, fullgraph=True)
    for p in (2, 2, 1, 1):
        loss_of(*batch, p).backward()
    assert graphs.frame_count == 2


def test_attention_in_training_runs_in_the_flash_kernel():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other would raise
        small_model(grid=8).loss(torch.randint(11, (2, 64)), torch.tensor([0, 1]), 2).backward()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    model, optimizer, batch = prepared("cuda")

    def step():
        codes, labels = (x.pin_memory().to("cuda", non_blocking=True) for x in batch)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(codes, labels, 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("p", (1, 2))
def test_graphs_on_a_gpu_draw_what_single_steps_draw(p):
    model = small_model(grid=8).cuda()
    labels = torch.tensor([0, 1, 2], device="cuda")
    cached = npp.CompiledModel(model, 6, p)        # kept, for its graphs to be replayed
    for _ in range(3):
        noise = torch.rand(3, 64, device="cuda")
        plain = npp.generate(model, labels, 2.0, noise=noise, p=p)
        graphs = npp.generate(model, labels, 2.0, noise=noise, p=p, cached=cached)
        assert torch.equal(plain, graphs)

# ---- 10. the command line -----------------------------------------------------------------------


def test_help_shows_every_flag_with_its_default_and_tinys(capsys):
    with pytest.raises(SystemExit) as stop:
        npp.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(npp.Config):
        assert f"    {field.name}: " in text
    assert "batch: int = 256" in text and "images in a step, over all ranks" in text
    assert "steps 1200, batch 64, lr 0.008" in text


def test_tiny_brings_its_own_recipe_and_the_others_the_papers():
    assert npp.parse([]).steps == npp.TINY["steps"] and npp.parse([]).dropout == 0
    paper = npp.parse(["--model", "B"])
    assert (paper.epochs, paper.steps, paper.lr, paper.dropout) == (300, 0, 1e-4, 0.1)
    half = npp.parse(["--epochs", "0.5"])
    assert (half.epochs, half.steps) == (0.5, 0)
    assert all(type(f.default) is f.type for f in fields(npp.Config))


def write_images(folder, size=16):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        os.makedirs(folder / name)
        for i in range(3):
            picture = Image.fromarray(rng.integers(255, size=(size, size + i, 3), dtype=np.uint8))
            picture.save(folder / name / f"{i}.png")
    return str(folder)


def test_own_images_become_codes_pictures_and_samples(tmp_path, capsys):
    images, data = write_images(tmp_path / "images"), str(tmp_path / "data")
    path, out = str(tmp_path / "tokenizer.pt"), str(tmp_path / "run")
    assert tokenizer.main(["train", images, path, *flags(
        image_size=16, steps=3, codebook_size=32, ch_mult="1,1,1")]) == 0
    for split in ("train", "val"):
        assert tokenizer.main(["encode", images, data, *flags(
            tokenizer=path, image_size=16, split=split)]) == 0
    codes = np.load(os.path.join(data, "codes.npy"))
    assert codes.shape == (6, 2, 16) and codes.dtype == np.uint8
    assert np.load(os.path.join(data, "labels.npy")).tolist() == [0, 0, 0, 1, 1, 1]
    assert tokenizer.main(["reconstruct", images, str(tmp_path / "again.png"), *flags(
        tokenizer=path, image_size=16)]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert train(data, out, steps=4) == 0
    for name in ("samples.png", "samples_p2.png", "samples_p1.png"):
        assert Image.open(os.path.join(out, name)).size == (10 * 17 * 4 - 4, 2 * 17 * 4 - 4)
    sampled = [str(tmp_path / x) for x in ("a.npz", "b.npz")]
    for path, micro in zip(sampled, (0, 2)):
        assert npp.main(flags(sample=os.path.join(out, "ckpt.pt"), out=path, n=5,
                              micro_batch=micro)) == 0
    a, b = (np.load(path) for path in sampled)
    assert a["arr_0"].shape == (5, 16, 16, 3) and a["labels"].tolist() == [0, 1, 0, 1, 0]
    assert np.array_equal(a["arr_0"], b["arr_0"])  # a sample does not depend on its batch
    picture = str(tmp_path / "dogs.png")
    assert npp.main(flags(sample=os.path.join(out, "ckpt.pt"), out=picture, classes="dogs,0",
                          n=6)) == 0
    assert Image.open(picture).size == (3 * 17 * 4 - 4, 2 * 17 * 4 - 4)


@pytest.mark.slow
def test_dry_run_of_the_whole_recipe_at_64_pixels(tmp_path, capsys):
    modes = "RGB", "L", "CMYK", "P"
    with np.load(os.path.join(FASHION, "reference.npz")) as z:
        images, labels = z["arr_0"], z["labels"]
    rows = np.flatnonzero(labels < 4)[:40]
    for i, (image, label) in enumerate(zip(images[rows], labels[rows])):
        shape = 64 + 7 * (i % 9), 64 + 11 * (i % 5)
        picture = Image.fromarray(image).resize(shape, Image.BICUBIC)
        kind = ("jpg", "png", "webp")[i % 3]
        if kind != "webp":
            mode = modes[i // 3 % 4]
            picture = picture.convert("L" if (mode, kind) in (("P", "jpg"), ("CMYK", "png"))
                                      else mode)
        path = tmp_path / "images" / str(label) / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    vq, data, out, samples = (str(tmp_path / x) for x in ("vq.pt", "codes", "run", "samples.npz"))
    tokenizer.save_tokenizer(vq, tokenizer.VQModel())       # VQ-16 at random
    encode = ["encode", str(tmp_path / "images"), data, *flags(tokenizer=vq, image_size=64)]
    assert tokenizer.main(encode) == 0
    assert np.load(os.path.join(data, "codes.npy")).shape == (40, 2, 16)
    assert npp.main(flags(data=data, out=out, steps=20, batch=8, eval_every=10)) == 0
    assert [x["p"] for x in log(out)][:1] + [x["p"] for x in log(out)][-1:] == [2, 1]
    assert npp.main(flags(sample=os.path.join(out, "ckpt.pt"), n=20, out=samples)) == 0
    assert fid.Images(samples)[:20].shape == (20, 64, 64, 3)

