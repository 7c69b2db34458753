"""What this project claims, as tests: python -m pytest (about two minutes on two CPU cores)"""

import argparse
import functools
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import common
import fid
import npp
import tokenizer
from data.fashion import features
from common import generator
from notebooks import evidence

HERE = os.path.dirname(os.path.abspath(__file__))
FASHION = os.path.join(HERE, "data", "fashion")
PATCH_EDGES = (1, 2, 4)
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
# Images, and what torch-fidelity 0.4.0's FeatureExtractorInceptionV3 makes of them with the weights
# of random_inception(): its outputs "2048" and "logits_unbiased", and the first 7 channels of
# Mixed_6d.branch1x1 as NHWC. `names` and `shapes` are those of its state dict.
INCEPTION = os.path.join(HERE, "data", "golden", "inception_random.npz")
# What LlamaGen's VQModel makes of images, with the weights of random_vq(): data/golden/README.md
VQ = os.path.join(HERE, "data", "golden", "vq_random.npz")

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
    facts = {"vocab": vocab, "grid": grid, "image_size": grid * 4, "tokenizer": None,
             "classes": [f"class {i}" for i in range(classes)], "tokenizer_sha256": None,
             "made_by": "a test", **meta}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(facts, f)
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

def test_cost_gives_the_table_of_the_paper():
    table_2 = {("B", (1,)): "25.06", ("L", (1,)): "83.54", ("XL", (1,)): "193.35",
               ("XXL", (1,)): "355.72", ("B", (2, 1)): "15.70", ("L", (8, 4, 2, 1)): "47.95"}
    for (size, patches), printed in table_2.items():
        assert f"{npp.cost(size, patches)[0] / 1e9:.2f}" == printed
    assert f"{npp.cost('XL', (1,), grid=24)[0] / 1e9:.2f}" == "434.11"
    for size, printed in (("XL", 102.78), ("XXL", 189.11)):  # labelled (2,1), which costs more
        assert npp.cost(size, (2, 1))[0] / 1e9 > 1.15 * printed
        fine, coarse = npp.cost(size, (2, 1))[1][::-1]  # what gives them is p = 2 counted twice
        assert (fine + coarse / 4) / 2e9 == pytest.approx(printed, abs=0.011)
    average, (coarse, fine) = npp.cost("B", (2, 1), lam=0.75)
    assert average == pytest.approx(0.75 * coarse + 0.25 * fine)

def test_cost_without_the_class_position_is_table_3s():
    for patches, lam, printed in (((2, 1), 1 / 2, "0.625"), ((4, 1), 1 / 2, "0.531"),
                                  ((2, 1), 2 / 3, "0.500"), ((2, 1), 3 / 4, "0.438"),
                                  ((2, 1), 4 / 5, "0.400"), ((4, 2, 1), 1 / 2, "0.578"),
                                  ((8, 4, 2, 1), 1 / 2, "0.572")):
        huge = [npp.cost("B", x, lam, grid=2**12)[0] for x in (patches, (1,))]  # 1 of 2^24 + 1
        assert f"{huge[0] / huge[1]:.3f}" == printed

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
    x = npp.patchify(model.tok_embeddings(codes), p)
    x = torch.cat([model.embed_class(labels), x[:, :-1]], dim=1)
    rope = npp.rope_2d(4 // p, model.head_dim)
    cache = [torch.zeros(2, 3, 2, positions, model.head_dim) for _ in range(2)]  # k and v by layer
    filled = [positions // 2] * (positions // 2) + [positions] * (positions // 2)  # as in a graph
    steps = [model.run(x[:, i : i + 1], rope[i : i + 1], cache, torch.tensor([i]),
                       torch.arange(filled[i])[None] <= i) for i in range(positions)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(codes, labels, p))

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
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(5, 3)
    u = torch.tensor([0.0, 0.49, 0.51, 0.76, 1 - 2**-24])
    assert npp.choose(logits, u).tolist() == [0, 0, 1, 2, 2]
    torch.manual_seed(0)
    counts = torch.bincount(npp.choose(logits[:1].expand(20000, 3), torch.rand(20000))) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)

@pytest.mark.parametrize("u", (0.0, 0.5, 1 - 2**-24))
def test_filters_keep_only_the_likeliest_codes(u):
    logits = torch.tensor([[0.05, 0.5, 0.05, 0.3, 0.1]]).log()
    u = torch.tensor([u])
    assert npp.choose(logits, u, top_k=1).item() == 1
    assert npp.choose(logits, u, top_k=2).item() in (1, 3)
    assert npp.choose(logits, u, top_p=0.4).item() == 1  # the code that crosses top_p stays
    assert npp.choose(logits, u, top_p=0.6).item() in (1, 3)
    assert npp.choose(logits, u, temperature=0).item() == 1

def test_top_k_1_is_argmax_at_every_position():
    model, labels = small_model(), torch.tensor([0, 1, 2])
    codes = npp.generate(model, labels, top_k=1)
    assert torch.equal(model(codes, labels).argmax(-1), codes)

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

def test_compiled_sampling_gives_the_same_codes():
    model, labels, noise = small_model(), torch.tensor([0, 1]), torch.rand(2, 16)
    assert torch.equal(npp.generate(model, labels, 2.0, noise=noise, compile=True),
                       npp.generate(model, labels, 2.0, noise=noise))

def test_patchwise_sampling_draws_every_code_of_a_patch_from_one_distribution():
    model, labels = small_model(), torch.tensor([0, 1])
    noise = torch.rand(2, 4)
    noise = noise.view(2, 2, 1, 2, 1).expand(2, 2, 2, 2, 2).reshape(2, 16)  # equal in each patch
    codes = npp.patch_targets(npp.generate(model, labels, noise=noise, p=2), 2)
    assert (codes == codes[..., :1]).all() and len(codes.unique()) > 1

# ---- 5. data ------------------------------------------------------------------------------------

def test_an_epoch_visits_every_image_once(data):
    codes, cfg = common.Codes(data), npp.Config(batch=36, class_dropout=0)  # 96 images
    order = [npp.permutation(96, 0, epoch) for epoch in range(3)]
    where = np.concatenate(order)
    for step in range(8):
        labels = npp.batch_at(codes, step, cfg)[1]
        assert labels.tolist() == codes.labels[where[step * 36 : step * 36 + 36]].tolist()
    assert sorted(order[0]) == list(range(96)) and not np.array_equal(order[0], order[1])

def test_batches_do_not_depend_on_ranks(data):
    codes, cfg = common.Codes(data), npp.Config(batch=12)
    whole = npp.batch_at(codes, 5, cfg)
    parts = [npp.batch_at(codes, 5, cfg, slice(r * 4, r * 4 + 4)) for r in range(3)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert not torch.equal(whole[0], npp.batch_at(codes, 5, npp.Config(batch=12, seed=1))[0])

def test_views_and_null_labels_are_drawn_at_random(data):
    codes, cfg = common.Codes(data), npp.Config(batch=4000)
    batch, labels = npp.batch_at(codes, 0, cfg)
    assert (labels == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    index = np.concatenate([npp.permutation(96, 0, e) for e in range(42)])[:4000]
    first = (batch.numpy() == codes.codes[index, 0]).all(1)
    assert 0.4 < first.mean() < 0.75  # a third of the images have two equal views

# ---- 6. training --------------------------------------------------------------------------------

def test_a_run_leaves_logs_checkpoints_and_no_rubbish(data, tmp_path):
    out = str(tmp_path / "run")
    assert train(data, out) == 0
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_p1.pt", "ckpt_p2.pt", "log.jsonl"]
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
    codes = common.Codes(data)
    model = npp.load_model(os.path.join(out, "ckpt.pt"))
    drawn = npp.generate(model, torch.from_numpy(codes.labels[:1].copy()))
    assert drawn[0].tolist() == codes.codes[0, 0].tolist()

def test_killed_and_resumed_is_bit_identical(data, tmp_path):
    whole, broken, long = str(tmp_path / "whole"), str(tmp_path / "broken"), {"steps": 160}
    process = start(data, whole, dropout=0.1, **long)
    assert process.wait(120) == 0, process.stderr.read()
    for step in (8, 92):  # once in each stage, off the checkpoints at multiples of 6
        process = start(data, broken, dropout=0.1, **long)
        wait_for_step(broken, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = start(data, broken, dropout=0.1, **long)
    assert process.wait(120) == 0, process.stderr.read()
    for name in ("ckpt_p2.pt", "ckpt_p1.pt", "ckpt.pt"):
        assert same(weights(whole, name), weights(broken, name))
    assert log(whole) == log(broken)

def test_a_torn_log_line_is_dropped_on_resume(data, tmp_path):
    out = str(tmp_path / "run")
    assert train(data, out, steps=12) == 0
    expected = log(out)
    state = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write('{"step": 12, "p": 1, "lo')
    npp.cut_log(os.path.join(out, "log.jsonl"), state["step"])
    assert log(out) == expected

@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signals_save_before_the_end(data, tmp_path, number):
    out = str(tmp_path / "run")
    process = start(data, out, steps=4000, save_every=4000, eval_every=4000)
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

def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path):
    out = str(tmp_path / "run")
    assert train(data, out, steps=4) == 0
    before = weights(out)
    program = ("import resource, sys, torch; import tokenizer as t;"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
               f"t.one_line_errors(lambda _: t.write_atomically({out + '/ckpt.pt'!r}, lambda f: "
               "torch.save(torch.zeros(1_000_000), f)))(None); print('went on')")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.stderr.count("\n") == 1 and "nothing is changed" in done.stderr
    assert same(before, weights(out)) and not os.path.exists(out + "/ckpt.pt.part")

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
    ({"stepz": 3}, "stepz"), ({"data": "none"}, "data is none"), ({"seed": -1}, "seed is -1"),
    ({"log_every": 0}, "log_every is 0"), ({"micro_batch": -1}, "micro_batch is -1"),
    ({"epochs": "nan"}, "epochs is nan"), ({"lr": -1}, "lr is -1"), ({"clip": 0}, "clip is 0"),
    ({"save_every": 0}, "save_every is 0"), ({"sample": "c.pt", "micro_batch": -1}, "micro_batch"),
    ({"sample": "c.pt", "dtype": "float8"}, "dtype is float8, expected auto, float32, bfloat16"),
    ({"sample": "c.pt", "top_p": 0}, "top_p is 0"), ({"class_dropout": 2}, "class_dropout is 2"),
    ({"dropout": 1.5}, "dropout is 1.5"), ({"tokenizer": "no.pt"}, "no.pt"),
    ({"classes": "class 9"}, "class 9"), ({"init": "no.pt"}, "no.pt"),
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
    ("codes.npy", np.zeros((96, 2, 16), np.int64), ("int64", "uint8 uint16")),
    ("codes.npy", np.zeros((96, 16), np.uint8), ("(96, 16)", "(-1, -1, 16)")),
    ("codes.npy", np.zeros((96, 2, 15), np.uint8), ("(96, 2, 15)",)),
    ("codes.npy", np.full((96, 2, 16), 16, np.uint8), ("16 to 16", "0 to 15")),
    ("labels.npy", np.full(96, 3), ("3 to 3", "0 to 2")),
    ("labels.npy", np.full(96, -1), ("-1 to -1",)),
    ("labels.npy", np.zeros(95, np.int64), ("(95,)", "(96,)")),
    ("codes_val.npy", np.zeros((32, 2, 9), np.uint8), ("(32, 2, 9)",)),
    ("meta.json", None, ("meta.json",)),
    ("meta.json", b"{", ("meta.json",)),
    ("meta.json", b'{"vocab": 16}', ("grid",)),
    ("meta.json", b'{"vocab": 16, "grid": "4", "image_size": 16, "classes": ["a"], '
                  b'"tokenizer": null, "tokenizer_sha256": null}', ("TypeError",)),
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
    assert np.array_equal(a["arr_0"], common.to_uint8(images))
    images = F.interpolate(images, (16, 16), mode="bicubic")  # before rounding, as LlamaGen does
    assert np.array_equal(b["arr_0"], common.to_uint8(images))
    assert npp.main([*args, *flags(out=tmp_path / "grid.png")]) == 0

@pytest.mark.parametrize("values, words", [
    ({"image_size": 2}, ["image_size is 2", "expected 4"]),
    ({"image_size": 25}, ["image_size is 25", "expected 24"]),
    ({"image_size_eval": -1}, ["image_size_eval is -1"]),
    ({"out": "samples.jpg"}, ["samples.jpg", ".png or .npz"]),
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

def test_recomputed_activations_give_the_same_training(data, tmp_path):
    outs = [str(tmp_path / name) for name in "ab"]
    assert train(data, outs[0], dropout=0.1) == 0 == npp.main([*flags(
        data=data, out=outs[1], dropout=0.1, **SHORT), "--recompute"])
    assert same(weights(outs[0]), weights(outs[1])) and log(outs[0]) == log(outs[1])

def test_readme_quotes_the_code_and_its_length():
    with open(os.path.join(HERE, "README.md")) as f:
        text = f.read()
    with open(os.path.join(HERE, "npp.py")) as f:
        code = f.read()
    quotes = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(quotes) == 2 and all(quote in code for quote in quotes)
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M):
        with open(os.path.join(HERE, name)) as f:
            assert len(f.readlines()) == int(lines), name
    for link in re.findall(r"\]\((?!http|#)(.*?)\)", text):
        assert os.path.exists(os.path.join(HERE, link)), link

# ---- 9. speed that can be checked without a clock -----------------------------------------------

def prepared(device="cpu", **values):
    """-> Config, model, optimizer, batch, Machine of a short training on 8 x 8 codes"""
    cfg = npp.Config(model="tiny", batch=4, **values)
    facts = {"vocab": 11, "grid": 8, "classes": range(3)}
    batch = torch.randint(11, (4, 64)), torch.randint(3, (4,))
    return cfg, *npp.build(cfg, facts, device), batch, common.Machine(cfg.dtype)

def test_each_patch_size_is_compiled_once_and_whole():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    cfg, model, optimizer, batch, machine = prepared(dtype="float32")
    compiled = torch.compile(model.cpu(), backend=graphs, dynamic=False, fullgraph=True)
    machine.device = "cpu"
    for p in (2, 2, 1, 1):
        npp.train_step(compiled, optimizer, batch, p, cfg, machine)
    assert graphs.frame_count == 2

def test_attention_in_training_runs_in_the_flash_kernel():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other would raise
        small_model(grid=8).loss(torch.randint(11, (2, 64)), torch.tensor([0, 1]), 2).backward()

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    cfg, model, optimizer, batch, machine = prepared("cuda")
    batch = [x.pin_memory() for x in batch]
    npp.train_step(model, optimizer, batch, 2, cfg, machine)
    torch.cuda.set_sync_debug_mode("error")
    try:
        npp.train_step(model, optimizer, batch, 2, cfg, machine)
    finally:
        torch.cuda.set_sync_debug_mode("default")

@gpu
@pytest.mark.parametrize("p", (1, 2))
def test_graphs_on_a_gpu_draw_what_single_steps_draw(p):
    model, noise = small_model(grid=8).cuda(), torch.rand(3, 64, device="cuda")
    labels = torch.tensor([0, 1, 2], device="cuda")
    codes = [npp.generate(model, labels, 2.0, noise=noise, compile=x, p=p) for x in (False, True)]
    assert torch.equal(*codes)

# ---- 10. the command line -----------------------------------------------------------------------

def test_every_flag_is_explained_by_help(capsys):
    with pytest.raises(SystemExit) as stop:
        npp.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in npp.NAMES:
        assert f"--{name} " in text
    assert "images a step, over all ranks" in text

def test_plan_shows_what_a_schedule_costs(capsys):
    arguments = flags(model="B", data="none", patches="2,1")
    assert npp.main([*arguments, "--plan"]) == 0
    text = capsys.readouterr().out
    assert "average 15.70, 0.6265 of the 25.06" in text
    assert f"{round(300 * 1281167 / 256) // 2:,}" in text

def test_tiny_brings_its_own_recipe_and_the_others_the_papers():
    assert npp.parse([]).steps == npp.TINY["steps"] and npp.parse([]).dropout == 0
    paper = npp.parse(["--model", "B"])
    assert (paper.epochs, paper.steps, paper.lr, paper.dropout) == (300, 0, 1e-4, 0.1)
    half = npp.parse(["--epochs", "0.5"])
    assert (half.epochs, half.steps) == (0.5, 0)
    assert all(type(f.default) is f.type for f in npp.fields(npp.Config))

# ---- 11. the tokenizer and the embedded data ----------------------------------------------------

def test_vq16_has_the_published_names_and_size():
    with torch.device("meta"):
        model = tokenizer.VQModel()
    state = model.state_dict()
    assert sum(w.numel() for w in model.parameters()) == 71_883_403 and model.factor == 16
    for name, shape in (("encoder.conv_blocks.4.attn.1.proj_out.weight", (512, 512, 1, 1)),
                        ("encoder.conv_blocks.0.downsample.conv.weight", (128, 128, 3, 3)),
                        ("encoder.conv_blocks.2.res.0.nin_shortcut.weight", (256, 128, 1, 1)),
                        ("decoder.conv_blocks.3.upsample.conv.bias", (128,)),
                        ("decoder.mid.1.norm.weight", (512,)),
                        ("quantize.embedding.weight", (16384, 8))):
        assert state[name].shape == shape

def test_embedded_images_survive_their_codes():
    model = tokenizer.load_tokenizer(os.path.join(FASHION, "tokenizer.pt"))
    with np.load(os.path.join(FASHION, "reference.npz")) as z:
        images = z["arr_0"][::20]
        labels = z["labels"]
    codes = np.load(os.path.join(FASHION, "codes_val.npy"))[:, 0]
    again = model.encode(common.from_uint8(images)).flatten(1).numpy()
    assert (again == codes[::20]).mean() > 0.999  # rounding may differ between machines
    shown = common.to_uint8(model.decode(torch.from_numpy(codes[::20]).long().view(-1, 8, 8)))
    inside = np.s_[:, 2:30, 2:30]  # the 28 x 28 original pixels
    error = np.square(images[inside].astype(float) - shown[inside]).mean()
    assert 10 * np.log10(255**2 / error) > 24.5
    assert np.array_equal(labels, np.load(os.path.join(FASHION, "labels_val.npy")))
    assert len(np.unique(np.load(os.path.join(FASHION, "codes.npy")))) == 256

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
    for name, columns in (("samples.png", 10), ("samples_p2.png", 5), ("samples_p1.png", 5)):
        picture = Image.open(os.path.join(out, name))
        assert picture.size == (columns * 17 * 4 - 4, 2 * 17 * 4 - 4)
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

def test_an_unreadable_image_is_named_and_the_rest_encoded(tmp_path, capsys):
    images, data = write_images(tmp_path / "images"), str(tmp_path / "data")
    with open(tmp_path / "images" / "cats" / "1.png", "wb") as f:
        f.write(b"no picture")
    path = str(tmp_path / "tokenizer.pt")
    tokenizer.save_tokenizer(path, tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32))
    assert tokenizer.main(["encode", images, data, *flags(tokenizer=path, image_size=16)]) == 2
    message = capsys.readouterr().err
    assert message.count("unreadable image") == 1 and "1.png" in message
    assert np.load(os.path.join(data, "labels.npy")).tolist() == [0, 0, 1, 1, 1]
    assert len(np.load(os.path.join(data, "codes.npy"))) == 5

@pytest.mark.parametrize("arguments, word", [
    (["encode", "nowhere", "x", "--tokenizer", "t.pt"], "nowhere"),
    (["train", "broken.npz", "x"], "broken.npz"), (["train", "empty", "x"], "no images"),
    (["encode", "images", "x", "--tokenizer", "none.pt"], "none.pt"),
    (["encode", "images", "x", "--tokenizer", "t.pt", "--image_size", "18"], "multiple of 4"),
    (["encode", "images", "x", "--tokenizer", "t.pt", "--split", "test"], "split is test"),
    (["train", "images", "x", "--codebook_size", "0"], "codebook_size is 0, expected 1 or more"),
    (["train", "images", "x", "--ch_mult", "0,1"], "ch_mult is (0, 1)"),
    (["reconstruct", "images", "x.png", "--tokenizer", "t.pt", "--image_size", "0"], "image_size"),
    (["enkode", "images", "x"], "enkode"), (["train", "images", "x", "--ch", "20"], "ch is 20"),
])
def test_bad_arguments_of_the_tokenizer_are_named(tmp_path, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    os.mkdir("empty")
    with open("broken.npz", "wb") as f:
        f.write(b"PK")
    tokenizer.save_tokenizer("t.pt", tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32))
    refuses(capsys, arguments, word, main=tokenizer.main)
    assert not os.path.exists("x")

# ---- 12. the tokenizer at full size -------------------------------------------------------------

@functools.cache
def random_vq(name):
    """A state dict in the official layout with seeded weights that keep the activations near 1"""
    state, golden = {}, np.load(VQ)
    for i, (key, shape) in enumerate(zip(golden[f"{name}_names"], golden[f"{name}_shapes"])):
        x = generator(0, i).standard_normal(shape[shape > 0], dtype=np.float32)
        if x.ndim == 4:
            x = x * np.float32(np.prod(x.shape[1:]) ** -0.5)
        elif not key.startswith("quantize"):
            x = 0.1 * x + ("norm" in key and key.endswith("weight"))
        state[str(key)] = torch.from_numpy(x)
    return state

@pytest.mark.parametrize("name, factor, sizes", [("vq16", 16, (64, 96)), ("vq8", 8, (64,))])
def test_published_tokenizers_give_the_official_codes_and_images(tmp_path, name, factor, sizes):
    path = str(tmp_path / "official.pt")
    torch.save({"model": random_vq(name)}, path)
    model = tokenizer.load_tokenizer(path)
    os.remove(path)  # 0.3 GB
    golden = np.load(VQ)
    assert {*model.state_dict(), "quantize.codebook_used"} == set(golden[f"{name}_names"])
    assert model.factor == factor
    for size in sizes:
        codes = model.encode(common.from_uint8(random_images(2, seed=1, size=size)))
        assert np.array_equal(codes.numpy(), golden[f"{name}_codes_{size}"])
        images = model.decode(codes)
        assert images.shape == (2, 3, size, size)
        official = torch.from_numpy(golden[f"{name}_images_{size}"])
        assert relative(images[..., ::3, ::3], official) < 1e-5

def test_a_tokenizer_that_lacks_a_weight_is_refused(tmp_path, capsys):
    path, state = str(tmp_path / "t.pt"), tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32).state_dict()
    for change in ({"decoder.mid.1.norm.bias": None}, {"extra.weight": torch.zeros(1)}):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save({"model": changed}, path)
        with pytest.raises(common.BadInput, match=next(iter(change))):
            tokenizer.load_tokenizer(path)

@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    """A file of a random VQModel that tells images apart: 32 codes, 4 pixels each"""
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("tokenizer") / "small.pt")
    tokenizer.save_tokenizer(path, tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32))
    return path

def class_folder(folder, images, names="ab"):
    for i, image in enumerate(images):
        path = folder / names[i * len(names) // len(images)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(folder)

def encoding(images, out, small_tokenizer, **values):
    return ["encode", str(images), str(out),
            *flags(**{"tokenizer": small_tokenizer, "image_size": 16, **values})]

def files(folder):
    """name -> bytes of every file below a folder"""
    return {os.path.relpath(os.path.join(where, name), folder): open(
        os.path.join(where, name), "rb").read() for where, _, names in os.walk(folder)
        for name in names}

@pytest.mark.parametrize("kind", ["jpeg", "webp", "gray", "cmyk", "palette", "16-bit", "16-bit I",
                                  "alpha", "gray alpha", "palette alpha", "keyed", "1-bit"])
def test_images_of_every_kind_give_the_expected_pixels(tmp_path, kind):
    colour = random_images(1, seed=5, size=16)[0]
    gray = colour[..., 0]
    alpha = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(16, 0)
    on_white = np.where(alpha[..., None] > 0, colour, 255)
    as_rgb = np.stack([gray] * 3, -1)
    picture, expected, options, tolerance = {
        "jpeg": (Image.fromarray(colour), colour,
                 dict(format="JPEG", quality=100, subsampling=0), 5),
        "webp": (Image.fromarray(colour), colour, dict(format="WEBP", lossless=True), 0),
        "gray": (Image.fromarray(gray), as_rgb, {}, 0),
        "cmyk": (Image.fromarray(colour).convert("CMYK"), colour,
                 dict(format="JPEG", quality=100, subsampling=0), 5),
        "palette": (Image.fromarray(gray).convert("P"), as_rgb, {}, 0),
        "16-bit": (Image.fromarray(gray.astype(np.uint16) * 257), as_rgb, {}, 0),
        "16-bit I": (Image.fromarray(gray.astype(np.int32) * 257), as_rgb, dict(format="TIFF"), 0),
        "alpha": (Image.fromarray(np.dstack([colour, alpha])), on_white, {}, 0),
        "gray alpha": (Image.fromarray(np.dstack([gray, alpha])),
                       np.where(alpha[..., None] > 0, as_rgb, 255), {}, 0),
        "palette alpha": (Image.fromarray(gray).convert("P"),
                          np.where(as_rgb == gray[0, 0], 255, as_rgb),
                          dict(transparency=int(gray[0, 0])), 0),
        "keyed": (Image.fromarray(colour),
                  np.where((colour == colour[0, 0]).all(-1)[..., None], 255, colour),
                  dict(transparency=tuple(colour[0, 0].tolist())), 0),
        "1-bit": (Image.fromarray(gray > 127), np.where(as_rgb > 127, 255, 0), {}, 0),
    }[kind]
    (tmp_path / "a" / "deeper").mkdir(parents=True)
    picture.save(tmp_path / "a" / "deeper" / "x", **{"format": "PNG", **options})
    (pixels,) = tokenizer.Images(str(tmp_path), 16)[0]
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance

def test_class_folders_are_read_in_the_order_of_imagefolder(tmp_path, capsys):
    names = ["b/2.png", "b/10.png", "a/z/1.png", "a/y/3.png", "a/1.png", "a/.hidden", "top.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c").mkdir()
    data = tokenizer.Images(str(tmp_path), 8)
    assert data.items.tolist() == [b"a/1.png", b"a/y/3.png", b"a/z/1.png", b"b/10.png", b"b/2.png"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.classes == ["a", "b", "c"]
    assert "top.txt" in capsys.readouterr().err

@pytest.mark.parametrize("size, scale", [(16, 1.1), (20, 1.25), (16, 1.5)])
def test_ten_crops_are_those_of_torchvision(size, scale):
    image = random_images(1, seed=2, size=64)[0]
    (whole,) = common.from_uint8(np.stack([tokenizer.center_crop(
        Image.fromarray(image), int(size * scale))]))
    side = whole.shape[-1]
    expected = []
    for flipped in (False, True):
        x = whole.flip(-1) if flipped else whole
        middle = int(round((side - size) / 2))
        for top, left in ((0, 0), (0, side - size), (side - size, 0), (side - size, side - size),
                          (middle, middle)):
            expected.append(x[:, top : top + size, left : left + size])
    for view, right in zip(tokenizer.crops(whole[None], size, "ten_crop"), expected, strict=True):
        assert torch.equal(view[0], right)

def test_views_of_two_scales_are_encoded_one_after_the_other(tmp_path, small_tokenizer):
    images = random_images(3, seed=3, size=64)
    np.savez(tmp_path / "x.npz", arr_0=images, labels=np.arange(3))
    out = tmp_path / "data"
    assert tokenizer.main(encoding(tmp_path / "x.npz", out, small_tokenizer, views="ten_crop",
                                   scales="1.5,1.25")) == 0
    codes, model = np.load(out / "codes.npy"), tokenizer.load_tokenizer(small_tokenizer)
    assert codes.shape == (3, 20, 16)
    for i, scale in enumerate((1.5, 1.25)):
        base = np.stack([tokenizer.center_crop(Image.fromarray(x), int(16 * scale))
                         for x in images])
        for j, view in enumerate(tokenizer.crops(common.from_uint8(base), 16, "ten_crop")):
            assert np.array_equal(model.encode(view).flatten(1), codes[:, 10 * i + j])
    assert len(np.unique(codes[0], axis=0)) > 10  # the views do differ
    assert tokenizer.main(encoding(tmp_path / "x.npz", out, small_tokenizer, split="val")) == 0
    assert npp.Codes(str(out)).val[0].shape == (3, 16)

def test_a_killed_encoding_goes_on_with_two_ranks_to_the_same_files(tmp_path, small_tokenizer,
                                                                    capfd):
    images = class_folder(tmp_path / "images", random_images(400, seed=4))
    for name in ("a/007.png", "b/350.png"):
        (tmp_path / "images" / name).write_text("no picture")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert tokenizer.main(encoding(images, whole, small_tokenizer)) == 2
    command = [sys.executable, os.path.join(HERE, "tokenizer.py"),
               *encoding(images, killed, small_tokenizer)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    status = killed / "codes.part" / "status"
    while process.poll() is None:
        if status.exists() and 1 in status.read_bytes():
            process.kill()
    process.communicate(timeout=30)  # ends when no worker holds the pipe any more
    assert process.returncode == -signal.SIGKILL and 0 in status.read_bytes()
    with pytest.raises(common.BadInput):
        npp.Codes(str(killed))
    capfd.readouterr()
    ranks = two_ranks(command)
    assert [process.wait(60) for process in ranks] == [2, 0]
    err = capfd.readouterr().err
    assert err.count("unreadable image") == 2 and "007.png" in err and "350.png" in err
    assert files(killed) == files(whole)
    assert np.load(whole / "codes.npy").shape == (398, 2, 16)
    assert np.bincount(np.load(whole / "labels.npy")).tolist() == [199, 199]

KILLER = """
import os, shutil, signal, sys
import torch, npp, tokenizer
from common import BadInput

def run(command, out, kill_at):  # in a child, which dies at the n-th change of the disk
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    left = [kill_at]
    def deadly(change):
        def changed(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments)
        return changed
    for name in ("replace", "remove"):
        setattr(os, name, deadly(getattr(os, name)))
    os._exit(tokenizer.main([x.replace("OUT", out) for x in command]))

def read(folder):
    with os.scandir(folder) as entries:
        return {e.name: open(e.path, "rb").read() for e in entries if e.is_file()}

old, new, out, *command = sys.argv[1:]
old_files, new_files, kill_at, died = read(old), read(new), 1, True
while died:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(old, out)
    died = run(command, out, kill_at) != 0
    try:
        npp.Codes(out)
        now = {k: v for k, v in read(out).items() if k in new_files}
        assert now in ({k: old_files[k] for k in new_files}, new_files), kill_at
    except BadInput:
        assert died, kill_at
    if died:
        assert run(command, out, 0) == 0
    assert read(out) == new_files, (kill_at, read(out).keys())
    kill_at += 1
print(kill_at)
"""

def test_no_kill_leaves_a_mix_of_two_encodings(tmp_path, small_tokenizer):
    for name, seed in ("old", 6), ("new", 7):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(40, seed), labels=np.arange(40) % 3)
    torch.manual_seed(1)
    other = str(tmp_path / "other.pt")
    tokenizer.save_tokenizer(other, tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32))
    for split in ("train", "val"):
        assert tokenizer.main(encoding(tmp_path / "old.npz", tmp_path / "old", other,
                                       split=split)) == 0
    new = encoding(tmp_path / "new.npz", tmp_path / "new", small_tokenizer)
    assert tokenizer.main(new) == 0
    done = subprocess.run([sys.executable, "-c", KILLER, *(str(tmp_path / x) for x in (
        "old", "new", "out")), *(x.replace(str(tmp_path / "new"), "OUT") if i == 2 else x
                                 for i, x in enumerate(new))],
        cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 9  # so many kills were survived

def test_another_encoding_under_way_is_not_touched(tmp_path, small_tokenizer, capsys):
    images, out = class_folder(tmp_path / "images", random_images(6)), tmp_path / "data"
    plan = {"vocab": 32, "grid": 4, "image_size": 16}
    tokenizer.Work(str(out / "codes.part"), plan, 6, 2).create()
    before = files(out)
    refuses(capsys, encoding(images, out, small_tokenizer, views="one"), "codes.part",
            "views is None there, one here", main=tokenizer.main)
    assert files(out) == before

def test_a_val_split_of_other_classes_is_refused(tmp_path, small_tokenizer, capsys):
    out = tmp_path / "data"
    images = class_folder(tmp_path / "images", random_images(6))
    other = class_folder(tmp_path / "other", random_images(6), names="xyz")
    refuses(capsys, encoding(images, out, small_tokenizer, split="val"), "meta.json",
            main=tokenizer.main)
    assert tokenizer.main(encoding(images, out, small_tokenizer)) == 0
    before = files(out)
    capsys.readouterr()
    refuses(capsys, encoding(other, out, small_tokenizer, split="val"), "classes is",
            main=tokenizer.main)
    assert files(out) == before

def test_memory_does_not_grow_with_the_codes_of_an_encoding(tmp_path):
    code = ("import resource, sys, numpy as np, tokenizer;"
            "work = tokenizer.Work(sys.argv[1], dict(vocab=16384, grid=16), 20_000, 10);"
            "work.create(); codes = np.ones((4000, 10, 256), np.uint16);"
            "work.write(0, codes, np.ones(4000, np.uint8));"
            "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "used = np.zeros(16384, bool); next(iter(work.rows(used))); before = rss();"
            "[work.write(i, codes, np.ones(4000, np.uint8)) for i in range(0, 20_000, 4000)];"
            "n = sum(len(x) for x in work.rows(used)); assert n == 20_000 and used.sum() == 1;"
            "print(rss() - before)")
    grown = subprocess.check_output([sys.executable, "-c", code, tmp_path / "work"], cwd=HERE)
    assert int(grown) < 40_000  # kB, where the codes are 102 MB

def llamagen_codes(folder, images=5, views=10, grid=4, vocab=16384, seed=0, size=64):
    """A folder as LlamaGen's extract_codes_c2i.py leaves it -> codes (images, views, N)"""
    codes = generator(seed).integers(0, vocab, (images, views, grid**2))
    for name in ("codes", "labels"):
        (folder / f"imagenet{size}_{name}").mkdir(parents=True)
    for i in range(images):
        np.save(folder / f"imagenet{size}_codes" / f"{i}.npy", codes[i : i + 1])
        np.save(folder / f"imagenet{size}_labels" / f"{i}.npy", np.array([i % 3]))
    return codes

def test_pack_adopts_the_codes_of_llamagen(tmp_path, small_tokenizer, capsys):
    first = llamagen_codes(tmp_path / "c2i_ten_crop", images=11)
    second = llamagen_codes(tmp_path / "c2i_ten_crop_105", images=11, seed=1)
    out = str(tmp_path / "data")
    assert tokenizer.main(["pack", str(tmp_path / "c2i_ten_crop") + "/", out]) == 0
    data = npp.Codes(out)
    assert np.array_equal(data.codes, np.concatenate([first, second], axis=1))
    assert data.labels.tolist() == [i % 3 for i in range(11)] and data.codes.dtype == np.uint16
    assert data.facts == {"vocab": 16384, "grid": 4, "image_size": 64, "images": 11,
                          "classes": ["0", "1", "2"], "tokenizer": None, "tokenizer_sha256": None}
    codes = llamagen_codes(tmp_path / "small", vocab=32, grid=4, views=2, size=16)
    out = str(tmp_path / "named")
    assert tokenizer.main(["pack", str(tmp_path / "small"), out,
                           *flags(tokenizer=small_tokenizer)]) == 0
    assert np.array_equal(np.load(os.path.join(out, "codes.npy")), codes)
    images = class_folder(tmp_path / "images", random_images(6), names="xyz")
    assert tokenizer.main(encoding(images, out, small_tokenizer, split="val")) == 0
    assert npp.Codes(out).facts["classes"] == ["0", "1", "2"] and npp.Codes(out).val

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
])
def test_pack_names_the_file_that_is_wrong(tmp_path, capsys, name, content, words):
    for folder in ("c_ten_crop", "c_ten_crop_105"):
        llamagen_codes(tmp_path / folder)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    assert tokenizer.main(["pack", str(tmp_path / "c_ten_crop"), str(tmp_path / "data")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message
    assert not (tmp_path / "data").exists() or not os.listdir(tmp_path / "data")

def test_reconstructions_become_an_npz_for_fid(tmp_path, small_tokenizer, capsys):
    images = random_images(40, seed=8, size=24)
    np.savez(tmp_path / "x.npz", arr_0=images, labels=np.arange(40))
    command = ["reconstruct", str(tmp_path / "x.npz"), str(tmp_path / "again.npz"),
               *flags(tokenizer=small_tokenizer, image_size=24)]
    assert tokenizer.main(command) == 0
    again, model = fid.Images(command[2]), tokenizer.load_tokenizer(small_tokenizer)
    expected = common.to_uint8(model.decode(model.encode(common.from_uint8(images[32:]))))
    assert np.array_equal(again[32:40], expected) and again.labels.tolist() == list(range(40))
    error = np.square(images.astype(float) - again[:40]).mean()
    assert f"PSNR {10 * np.log10(255**2 / error):.2f} dB" in capsys.readouterr().out

def test_reconstructions_of_unreadable_images_are_refused(tmp_path, small_tokenizer, capsys):
    images = class_folder(tmp_path / "images", random_images(6))
    (tmp_path / "images" / "a" / "notes.txt").write_text("no picture")
    for out in (tmp_path / "x.npz", tmp_path / "x.png"):
        refuses(capsys, ["reconstruct", images, str(out), *flags(
            tokenizer=small_tokenizer, image_size=16)], "notes.txt", main=tokenizer.main)
        assert not out.exists() and not os.path.exists(f"{out}.part")

@pytest.mark.slow
def test_two_ranks_end_with_the_scores_of_their_samples_and_a_finished_run_too(tmp_path, capsys):
    folder = str(tmp_path / "run")
    process = start(FASHION, folder, *TWO_RANKS, steps=2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and out.count("class accuracy") == 1, err
    assert train(FASHION, folder, steps=2) == 0
    again = capsys.readouterr().out
    assert "is finished" in again and again.count("class accuracy") == 1

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
    torch.save({"model": random_vq("vq16")}, vq)
    encode = ["encode", str(tmp_path / "images"), data, *flags(tokenizer=vq, image_size=64)]
    assert tokenizer.main(encode) == 0
    assert np.load(os.path.join(data, "codes.npy")).shape == (40, 2, 16)
    assert npp.main(flags(data=data, out=out, steps=20, batch=8, eval_every=10)) == 0
    assert [x["p"] for x in log(out)][:1] + [x["p"] for x in log(out)][-1:] == [2, 1]
    assert npp.main(flags(sample=os.path.join(out, "ckpt.pt"), n=20, out=samples)) == 0
    assert fid.Images(samples)[:20].shape == (20, 64, 64, 3)

# ---- 13. helpers for the metrics ----------------------------------------------------------------

@functools.cache
def random_inception():
    """A state dict of Inception V3 with seeded weights that keep the activations near 1"""
    state, golden = {}, np.load(INCEPTION)
    for i, (name, shape) in enumerate(zip(golden["names"].tolist(), golden["shapes"])):
        x = generator(0, i).standard_normal(shape[shape > 0], dtype=np.float32)
        if name.endswith(("bn.weight", "running_var")):
            x = 1 + 0.2 * np.tanh(x)
        elif name.endswith(("conv.weight", "fc.weight")):
            x = x * np.float32((2 / np.prod(x.shape[1:])) ** 0.5)
        else:
            x = 0.1 * x
        state[name] = torch.from_numpy(x)
    return state

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_inception(), path)
    return str(path)

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

def small_report(images, labels, folder):
    net = fid.load_network(str(folder / "features.pt"))
    return fid.evaluate(net, images, labels, str(folder / "reference.npz"))

def random_images(n, seed=0, size=16):
    """Blotches, so that features differ from image to image"""
    coarse = generator(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)

def gaussian(n, d, seed, rank=None):
    """n draws of d correlated features, in a space of the given rank"""
    rng, rank = generator(seed), rank or d
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + rng.standard_normal(d)

def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)

def frechet_of_features(x, y):
    """Without covariances: the root's trace is the nuclear norm of the product of the features"""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
    return shift + np.sum(a**2) + np.sum(b**2) - 2 * np.linalg.norm(a @ b.T, "nuc")

# ---- 14. Inception and the Frechet distance -----------------------------------------------------

def test_inception_has_the_published_shape():
    state = random_inception()
    trained = {k: v for k, v in state.items() if "running" not in k}
    assert sum(v.numel() for v in trained.values()) == 23_850_960
    assert len(fid.Inception(state).convs) == 94

def test_inception_gives_torch_fidelitys_numbers():
    golden, net = np.load(INCEPTION), fid.Inception(random_inception())
    with torch.no_grad():
        pooled, spatial = net(torch.from_numpy(golden["images"]))
    for ours, name in (pooled, "features"), (spatial, "spatial"), (net.logits(pooled), "logits"):
        assert ours.shape == golden[name].shape
        assert np.abs(ours.numpy() - golden[name]).max() < 1e-5 * np.abs(golden[name]).max()

def test_inception_uses_every_convolution_once():
    net, used = fid.Inception(random_inception()), []
    conv = net.conv
    net.conv = lambda x, name: used.append(name.rstrip("/!")) or conv(x, name)
    net(torch.from_numpy(random_images(1)))
    assert sorted(used) == sorted(net.convs)

@pytest.mark.parametrize("size", [(1, 1), (7, 31), (32, 32), (299, 299), (300, 512)])
def test_resize_is_that_of_tensorflow_1(size):
    image = generator(0).integers(0, 256, size).astype(np.float64)
    expected = np.empty((299, 299))
    for i in range(299):
        for j in range(299):
            y, x = i * size[0] / 299, j * size[1] / 299
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, size[0] - 1), min(x0 + 1, size[1] - 1)
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - x0)
            bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - x0)
            expected[i, j] = top + (bottom - top) * (y - y0)
    rows, columns = map(fid.interpolation, size)
    resized = rows @ torch.from_numpy(image).float() @ columns.T
    assert np.abs(resized.numpy() - expected).max() < 255 * 1e-4

def test_frechet_distance_of_shifted_unit_gaussians_is_the_squared_shift():
    d, one = 2048, np.eye(2048)
    assert fid.frechet_distance(np.zeros(d), one, np.ones(d), one) == pytest.approx(2048, rel=1e-12)

def test_frechet_distance_of_commuting_covariances_matches_closed_form():
    a, b = generator(0).uniform(0, 2, (2, 50))
    a[:5], b[3:9] = 0, 0
    turn = np.linalg.qr(generator(1).standard_normal((50, 50)))[0]
    mu = np.zeros(50)
    distance = fid.frechet_distance(mu, turn * a @ turn.T, mu, turn * b @ turn.T)
    assert distance == pytest.approx(np.sum((a**0.5 - b**0.5) ** 2), rel=1e-6)

def test_frechet_distance_agrees_with_scipys_sqrtm():
    (mu1, cov1), (mu2, cov2) = (statistics(gaussian(n, 200, seed=n)) for n in (900, 500))
    scipys = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)
    assert fid.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(scipys, rel=1e-9)

@pytest.mark.parametrize("n, m", [(30, 40), (30, 900), (900, 30)])
def test_frechet_distance_stays_exact_where_covariances_are_singular(n, m):
    x, y = gaussian(n, 200, seed=0), gaussian(m, 200, seed=1)
    ours = fid.frechet_distance(*statistics(x), *statistics(y))
    assert ours == pytest.approx(frechet_of_features(x, y), rel=1e-12)

def test_frechet_distance_to_itself_is_zero_and_order_does_not_matter():
    a, b = statistics(gaussian(300, 80, seed=0)), statistics(gaussian(60, 80, seed=1))
    assert abs(fid.frechet_distance(*b, *b)) < 1e-10 * np.trace(b[1])
    assert fid.frechet_distance(*a, *b) == pytest.approx(fid.frechet_distance(*b, *a), rel=1e-12)

# ---- 15. the other metrics, against the plainest code -------------------------------------------

def test_streamed_moments_equal_numpys_even_far_from_zero():
    x = generator(0).standard_normal((1000, 20)) + 1000
    moments = fid.Moments(20)
    for part in np.split(x, [1, 64, 500]):
        moments.update(torch.from_numpy(part))
    mu, cov = moments.statistics()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), atol=1e-8)

def test_inception_score_is_the_mean_over_contiguous_splits():
    logits = torch.from_numpy(generator(0).standard_normal((250, 12)) * 3)
    scores = []
    for first in (0, 100, 200):
        p = torch.softmax(logits[first:first + 100], 1).numpy()
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))
    assert fid.inception_score(logits, split=100) == pytest.approx(np.mean(scores), rel=1e-12)

def test_inception_score_survives_certainty():
    logits = torch.eye(10).repeat(5, 1) * 2000  # every probability is 0 or 1
    assert fid.inception_score(logits) == pytest.approx(10)

def test_precision_and_recall_match_brute_force():
    real, fake = gaussian(700, 3, seed=0), 1.3 * gaussian(620, 3, seed=0) - 0.5

    def share(x, y):
        between = np.sqrt(((y[:, None] - y) ** 2).sum(2))
        radius = np.sort(between, axis=1)[:, 3]  # at 0 is the point itself
        return np.mean([(np.sqrt(((a - y) ** 2).sum(1)) <= radius).any() for a in x])
    ours = fid.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert ours == (share(fake, real), share(real, fake))
    assert 0.1 < ours[0] < 0.9 and 0.1 < ours[1] < 0.9  # both could have gone wrong

def test_kid_matches_brute_force_over_all_pairs():
    x, y = gaussian(30, 5, seed=0), gaussian(41, 5, seed=1)

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3
    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    ours = fid.kid(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(xx + yy - 2 * xy, rel=1e-10)

def test_kid_is_unbiased():
    pairs = torch.from_numpy(generator(0).standard_normal((400, 2, 20, 4)))
    draws = [fid.kid(x, y) for x, y in pairs]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20 and min(draws) < 0

# ---- 16. samples and references -----------------------------------------------------------------

@pytest.mark.parametrize("compression", [0, 8, 12])  # stored, deflate, bz2
def test_npz_is_read_in_slices_in_any_order(tmp_path, compression):
    images = random_images(50)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as z, z.open("arr_0.npy", "w") as f:
        np.lib.format.write_array(f, images)
    read = fid.Images(str(tmp_path / "a.npz"))
    assert len(read) == 50
    for part in slice(40, 50), slice(0, 7), slice(7, 20), slice(None):
        np.testing.assert_array_equal(read[part], images[part])

def test_an_npz_of_many_images_is_not_loaded(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((10_000, 64, 64, 3), np.uint8))  # 123 MB
    code = ("import resource, sys, fid; images = fid.Images(sys.argv[1]);"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "[images[i:i + 64] for i in range(0, 10_000, 64)];"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    grown = subprocess.check_output([sys.executable, "-c", code, tmp_path / "a.npz"], cwd=HERE)
    assert int(grown) < 30_000  # kB

def test_a_folder_gives_what_the_npz_of_its_images_gives(small, tmp_path):
    images = random_images(70)
    np.savez(tmp_path / "a.npz", arr_0=images)
    for i, image in enumerate(images):
        path = tmp_path / "folder" / str(i // 50) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    net, reference = fid.load_network(str(small / "features.pt")), str(small / "reference.npz")
    a, b = (fid.evaluate(net, fid.Images(str(tmp_path / name)), None, reference)
            for name in ("a.npz", "folder"))
    assert a == b

def test_a_saved_reference_gives_what_its_images_give(small, tmp_path, capsys):
    np.savez(tmp_path / "real.npz", arr_0=random_images(90, seed=3))
    np.savez(tmp_path / "fake.npz", arr_0=random_images(80, seed=4))
    real, fake, saved = (str(tmp_path / f"{name}.npz") for name in ("real", "fake", "saved"))
    weights = ["--weights", str(small / "features.pt"), "--json"]
    assert fid.main([real, saved, "--save", *weights]) == 0
    reports = []
    for reference in real, saved:
        assert fid.main([fake, reference, *weights]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert "KID" in reports[0] and "KID" not in reports[1]  # needs images
    from_images, from_statistics = (report["FD(toy-classifier)"] for report in reports)
    assert from_statistics == pytest.approx(from_images, rel=1e-9)

def test_inception_reports_the_whole_protocol(inception_file, tmp_path, capsys):
    np.savez(tmp_path / "fake.npz", arr_0=random_images(6, seed=0))
    np.savez(tmp_path / "real.npz", arr_0=random_images(5, seed=1))
    files = [str(tmp_path / "fake.npz"), str(tmp_path / "real.npz")]
    assert fid.main([*files, "--weights", inception_file, "--json"]) == 0
    out, err = capsys.readouterr()
    report, net = json.loads(out), fid.load_network(inception_file)
    x, y = (net(torch.from_numpy(np.load(f)["arr_0"])) for f in files)
    for name, a, b in zip(("FID", "sFID"), x, y):
        expected = frechet_of_features(a.double().numpy(), b.double().numpy())
        assert report[name] == pytest.approx(expected, rel=1e-5)
    assert report["IS"] == pytest.approx(fid.inception_score(net.logits(x[0])), rel=1e-5)
    assert (report["n"], report["n_reference"], report["d"]) == (6, 5, 2048)
    assert "warning" in err and fid.WEIGHTS_SHA256 in err  # these are not the published weights

def test_two_ranks_give_what_one_gives(small, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=random_images(101), labels=np.arange(101) % 3)
    command = [str(tmp_path / "a.npz"), str(small / "reference.npz"), "--json"]
    assert fid.main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    ranks = two_ranks([sys.executable, "fid.py", *command], cwd=HERE, stdout=subprocess.PIPE,
                      text=True)
    together, silent = (rank.communicate(timeout=120)[0] for rank in ranks)
    together = json.loads(together)
    assert silent == "" and alone.keys() == together.keys()
    for name, value in alone.items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
        assert together[name] == same

def test_real_images_give_the_floor_that_is_printed(small):
    kept = np.load(small / "reference.npz")["arr_0"]
    halves = kept[generator(0).permutation(120)].reshape(2, 60, *kept.shape[1:])
    a, b = (small_report(half, np.zeros(60), small) for half in halves)
    assert a["real_against_real"] == b["real_against_real"] == pytest.approx(
        (a["FD(toy-classifier)"] + b["FD(toy-classifier)"]) / 2, rel=1e-5)
    assert "FID" not in a and a["n"] == 60

def test_training_learns_and_leaves_a_reference(tmp_path, capsys):
    labels = np.arange(600) % 3
    for name, seed in ("train", 0), ("test", 1):
        images = random_images(600, seed) // 4
        images[np.arange(600), :, :, labels] += 60  # the class is the brightest channel
        np.savez(tmp_path / f"{name}.npz", arr_0=images, labels=labels)
    data = tmp_path / "toy"
    data.mkdir()
    saved = features.train_classifier(images, labels, "toy-classifier", steps=60, batch=32)
    again = features.train_classifier(images, labels, "toy-classifier", steps=60, batch=32)
    assert all(torch.equal(a, b) for a, b in zip(saved["model"].values(), again["model"].values()))
    torch.save(saved, data / "features.pt")
    net = fid.load_network(str(data / "features.pt"))
    fid.save_reference(str(data / "reference.npz"), net, images, arr_0=images, labels=labels)
    report = small_report(images, labels, data)
    assert report["class_accuracy"] > 0.9

# ---- 17. bad input to fid.py --------------------------------------------------------------------

def bad(argv, capsys):
    out, err = refuses(capsys, argv, main=fid.main)
    assert out == ""
    return err

def test_missing_weights_say_where_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=random_images(5))
    err = bad(["a.npz", "a.npz"], capsys)
    assert fid.WEIGHTS in err and fid.WEIGHTS_SHA256 in err and "https://" in err

@pytest.mark.parametrize("change, why", [
    (lambda s: s.pop("Mixed_5c.branch_pool.conv.weight"), "Mixed_5c.branch_pool"),
    (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), "1008"),
    (lambda s: s.update({"extra.conv.weight": torch.zeros(1, 1, 1, 1)}), "extra")])
def test_weights_of_another_network_are_refused(tmp_path, capsys, change, why):
    state = dict(random_inception())
    change(state)
    torch.save(state, tmp_path / "other.pth")
    np.savez(tmp_path / "a.npz", arr_0=random_images(5))
    a = str(tmp_path / "a.npz")
    err = bad([a, a, "--weights", str(tmp_path / "other.pth")], capsys)
    assert "other.pth" in err and why in err

def test_statistics_of_another_network_are_refused(small, tmp_path, capsys):
    npz = dict(np.load(small / "reference.npz"))
    np.savez(tmp_path / "a.npz", **{**npz, "sha256": "0" * 64})
    np.savez(tmp_path / "b.npz", **{**npz, "mu": np.zeros(5), "sigma": np.eye(5)})
    np.savez(tmp_path / "c.npz", **{**npz, "sigma": npz["sigma"] * np.nan})
    samples, weights = str(small / "reference.npz"), ["--weights", str(small / "features.pt")]
    assert "0" * 64 in bad([samples, str(tmp_path / "a.npz"), *weights], capsys)
    assert "(5, 5)" in bad([samples, str(tmp_path / "b.npz"), *weights], capsys)
    assert "c.npz" in bad([samples, str(tmp_path / "c.npz"), *weights], capsys)

@pytest.mark.parametrize("kind, why", [
    ("missing", "No such file"), ("text", "pickled"), ("truncated", "zip"), ("cut", "bad.npz"),
    ("float", "float64"), ("gray", "(9, 16, 16)"), ("few", "3 images"), ("no arr_0", "arr_0"),
    ("empty folder", "bad.npz"), ("broken image", "b.png"), ("two sizes", "same shape"),
    ("labels", "labels (8,)")])
def test_unusable_samples_are_named_in_one_line(small, tmp_path, capsys, kind, why):
    path, images = tmp_path / "bad.npz", random_images(9)
    arrays = {"float": images / 1.0, "gray": images[..., 0], "few": images[:3]}
    if kind in ("empty folder", "broken image", "two sizes"):
        path.mkdir()
    if kind in ("broken image", "two sizes"):
        for name, image in zip("abcd", images):
            Image.fromarray(image).save(path / f"{name}.png")
    if kind == "broken image":
        (path / "b.png").write_bytes((path / "b.png").read_bytes()[:60])
    elif kind == "two sizes":
        Image.fromarray(images[0, :8]).save(path / "b.png")
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "labels":
        np.savez(path, arr_0=images, labels=np.zeros(8))
    elif kind == "no arr_0":
        np.savez(path, images=images)
    elif path.suffix and not path.exists() and kind != "missing":
        np.savez(path, arr_0=arrays.get(kind, images))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "cut":  # the directory of the archive is there, the end of the array is not
        whole = path.read_bytes()
        path.write_bytes(whole.replace(whole[1000:3000], b""))
    assert why in bad([str(path), str(small / "reference.npz")], capsys)

def bench_lines(capsys, **values):
    """-> {name: line} of the rows, and of the ratios"""
    assert bench.main([*flags(rounds=2, batch=2, grid=4, **values), "--json"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    for line in lines[1:]:
        assert len(line["rounds"]) == 2 and min(line["rounds"]) > 0
        assert min(line["rounds"]) <= line["median"] <= max(line["rounds"])
    return [{x[kind]: x for x in lines if kind in x} for kind in ("row", "ratio")]

def test_bench_times_training_by_patch_size_and_by_schedule(capsys):
    rows, ratios = bench_lines(capsys, what="train")
    assert list(rows)[:2] == ["matmul", "read"] and rows["matmul"]["share"] == 1
    assert list(rows)[2:5] == [f"train ours eager p={p}" for p in (1, 2, 4)]
    work = [x["TFLOP/s"] * x["median"] for x in list(rows.values())[2:5]]
    assert work == pytest.approx([work[0], work[0] / 4, work[0] / 16])
    assert {k.removeprefix("train ours eager "): x["theory"] for k, x in ratios.items()
            if "ours eager" in k} == {"p=2 / p=1": 1 / 4, "p=4 / p=1": 1 / 16, "(2,1) / p=1": 0.625}
    one, two = (np.array(rows[f"train ours eager p={p}"]["rounds"]) for p in (1, 2))
    assert ratios["train ours eager (2,1) / p=1"]["rounds"] == pytest.approx((one + two) / 2 / one)

def test_bench_times_sampling_and_the_data_pipeline(capsys):
    rows, ratios = bench_lines(capsys, what="sample,data")
    for row in (f"sample {n} guidance {scale} ours eager" for n in (1, 2) for scale in (1, 2)):
        facts = rows[row]
        assert facts["codes/s"] == pytest.approx(16 * facts["images/s"]) and facts["images/s"] > 0
        assert facts["of"] in ("matmul", "read") and 0 < facts["share"] < math.inf
    assert rows["data in one file"]["images/s"] > 0 and rows["data in many files"]["images/s"] > 0
    assert list(ratios) == ["sample 2 guidance 1 ours eager / 2 ours eager",
                            "data, many files / one"]

@pytest.mark.parametrize("values, word", [
    ({"what": "nothing"}, "'what': 'nothing'"), ({"size": "M"}, "'size': 'M'"),
    ({"rounds": 0}, "'rounds': 0"), ({"batch": 0}, "'batch': 0"), ({"grid": 6}, "'grid': 6"),
    ({"vocab": -1}, "'vocab': -1"), ({"peer": "nowhere", "what": "train"}, "nowhere: expected"),
])
def test_bench_refuses_what_it_cannot_time(capsys, values, word):
    assert bench.main(flags(**values)) == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1

@pytest.mark.skipif("NPP_PEER" not in os.environ, reason="NPP_PEER names no official checkout")
def test_bench_times_the_official_model_with_our_weights(capsys):
    size, shape = npp.SIZES["tiny"], {"vocab": 256, "grid": 4}
    ours = npp.Transformer(**size, classes=1000, **shape).eval()
    torch.nn.init.normal_(ours.output.weight, std=0.3)
    args = argparse.Namespace(peer=os.environ["NPP_PEER"], size="tiny", **shape)
    official, codes, labels = bench.Official(args, ours), torch.randint(256, (2, 16)), [3, 7]
    for module in official.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    official.model.cls_embedding.dropout_prob = 0.0
    for p in PATCH_EDGES:
        loss = ours.loss(codes, torch.tensor(labels), p)
        assert official(codes, torch.tensor(labels), p).item() == pytest.approx(loss.item(), 1e-5)
    rows, ratios = bench_lines(capsys, what="train,sample", peer=args.peer)
    assert {f"train official eager p={p}" for p in PATCH_EDGES} < rows.keys()
    assert "sample 2 guidance 2 official eager" in rows
    assert "train eager (2,1) official / ours" in ratios

@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "--jsn"], ["a", "b", "--js"]])
def test_a_wrong_command_line_is_one_line(argv, capsys):
    assert "fid.py" in bad(argv, capsys)

def test_train_features_wants_labels(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=random_images(5))
    assert features.main([str(tmp_path / "a.npz")] * 2 + [str(tmp_path)]) == 2
    assert "labels" in capsys.readouterr().err and not (tmp_path / "features.pt").exists()
    assert features.main(["missing.npz", "missing.npz", str(tmp_path)]) == 2
    assert "missing.npz" in capsys.readouterr().err

# ---- 18. evidence ------------------------------------------------------------------------------

def test_equal_cost_means_the_same_multiply_adds():
    steps = round(1200 * evidence.RUNS["equal_cost"].share)
    a, b = (evidence.spent(name, "tiny", n) for name, n in (("equal_cost", steps), ("2-1", 1200)))
    assert steps == 757 and abs(a / b - 1) < 1e-3

def test_rescaled_averages_are_as_large_as_embeddings():
    x = torch.randn(4, 64, 256)
    y = evidence.rescaled_embeddings()["patchify"](x, 2)
    assert npp.patchify(x, 2).std() < 0.55 and abs(y.std() - 1) < 0.05

def test_averaged_positions_put_patches_p_codes_apart():
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 1, 65, 32)  # the same vector everywhere
    codes, patches = npp.rope_2d(8, 32), evidence.averaged_positions()["rope_2d"](4, 32)

    def score(rope, i, j):  # of positions in reading order, the class before them
        return (npp.rotate(q[:, :, i:i + 1], rope[i:i + 1])
                * npp.rotate(k[:, :, j:j + 1], rope[j:j + 1])).sum()

    # one row down and one column right is five patches on, and two rows and columns of codes
    torch.testing.assert_close(score(patches, 1, 6), score(codes, 1, 19))
    assert (patches[0] == 0).all() and not torch.equal(patches[1:], npp.rope_2d(4, 32)[1:])

def test_a_reset_optimizer_counts_the_steps_of_the_last_stage(data, tmp_path):
    def steps(name):
        saved = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        return {x["step"].item() for x in saved["optimizer"]["state"].values()}

    assert train(data, tmp_path / "kept", patches="2,1") == 0 and steps("kept") == {24}
    with evidence.patch.multiple(npp, **evidence.optimizer_reset()):
        assert train(data, tmp_path / "reset", patches="2,1") == 0
    assert steps("reset") == {12}

def test_the_doubled_rate_is_doubled_only_where_p_is_2():
    doubled = evidence.double_rate()["lr_at"]
    rest = 1200, (2, 1), 0.5, 1e-3, 0, 50, 0.2
    assert doubled(300, *rest) == 2 * npp.lr_at(300, *rest)
    assert doubled(900, *rest) == npp.lr_at(900, *rest)

def test_the_report_says_lower_only_where_seeds_separate():
    a = {0: 1.0, 1: 2.0, 2: 3.0}
    assert evidence.versus({s: x - 0.1 - s / 1e3 for s, x in a.items()}, a, 2).endswith("lower")
    assert evidence.versus({0: 0.9, 1: 2.2, 2: 2.8}, a, 2).endswith("not separated")
    assert evidence.versus({0: 0.9}, a, 2) == "–"

def test_a_finished_run_of_the_grid_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", str(tmp_path))  # where runs are put
    path = tmp_path / "evidence.jsonl"
    path.write_text(json.dumps(dict(run="plain", seed=7, size="tiny", grid_steps=6, batch=64)))
    arguments = ["run", *flags(only="plain", seeds=7, steps=6, results=path)]
    before = path.read_bytes()
    assert evidence.main(arguments) == 0 and path.read_bytes() == before
    assert not list(tmp_path.rglob("*.pt"))

def test_the_grid_refuses_runs_it_does_not_know(tmp_path, capsys):
    refuses(capsys, ["run", *flags(only="plain,3-1")], "only plain,3-1", main=evidence.main)
    refuses(capsys, ["run", *flags(seeds=-1)], "seeds (-1,)", main=evidence.main)
    refuses(capsys, ["report", *flags(results=tmp_path / "none")], "none", main=evidence.main)
