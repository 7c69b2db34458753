"""What npp.py claims, as tests: python -m pytest test_npp.py"""

import argparse
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

import fid
import npp
import tokenizer

HERE = Path(__file__).resolve().parent
PATCH_EDGES = (1, 2, 4)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
GONE = object()  # stands for the value of an entry that is to be removed
STARTED = []  # the processes of the test that runs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- Helpers -------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails does not leave its processes running"""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


@pytest.fixture(scope="module")
def golden():
    """The official code's numbers for a random model of 2 layers: see data/golden/README.md"""
    official = {}
    weights = {}
    with np.load(HERE / "data" / "golden" / "llamagen_tiny.npz") as arrays:
        for name, array in arrays.items():
            official[name] = torch.from_numpy(array)
            if name.startswith("model."):
                weights[name.removeprefix("model.")] = official[name]
    n_layer, n_head, dim, vocab, grid, classes = official["config"].tolist()
    model = npp.Transformer(n_layer, n_head, dim, vocab, classes, grid)
    model.load_state_dict(weights)
    return official, model.eval()


def small_model(vocab=11, classes=3, grid=4, dim=32):
    """Two layers with two heads, the same weights in every call"""
    torch.manual_seed(0)
    model = npp.Transformer(2, 2, dim, vocab, classes, grid)
    # The output weights start as zeros, and those would hide every difference.
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def small_training(device="cpu"):
    """-> model, optimizer, codes and labels of a short training on 8 x 8 codes"""
    cfg = npp.Config(model="tiny", batch=4)
    meta = {"vocab": 11, "grid": 8, "classes": ["a", "b", "c"]}
    model, optimizer = npp.build(cfg, meta, torch.device(device))
    codes = torch.randint(11, (4, 64))
    labels = torch.randint(3, (4,))
    return model, optimizer, codes, labels


def relative(a, b):
    """The largest difference between a and b, as a share of the largest number in b"""
    return ((a - b).abs().max() / b.abs().max()).item()


def same(a, b):
    """Whether two state dicts have the same names and bit-identical weights"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_data(folder, images=96, classes=3, views=2, **changes):
    """A data set without a tokenizer: codes that depend on the class and the position

    changes: entries of meta.json with other values
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=images)
    shift = rng.integers(3, size=(images, views, 1))
    codes = (labels[:, None, None] + np.arange(16) + shift) % 16        # (images, views, 4 * 4)
    codes = codes.astype(np.uint8)
    folder.mkdir()
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "codes_val.npy", codes[:32])
    np.save(folder / "labels_val.npy", labels[:32])
    meta = {
        "vocab": 16,
        "grid": 4,
        "image_size": 16,
        "classes": [f"class {i}" for i in range(classes)],
        "tokenizer": None,
        "tokenizer_sha256": None,
        "made_by": "a test",
    }
    meta.update(changes)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def flags(**values):
    """n=5 -> ["--n", "5"]"""
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def training(data, out, **changes):
    """The arguments of a short training, with some of its values changed"""
    values = {
        "data": data,
        "out": out,
        "steps": 24,
        "batch": 8,
        "lr": 0.03,
        "log_every": 4,
        "eval_every": 8,
        "save_every": 6,
    }
    values.update(changes)
    return flags(**values)


def train(data, out, **changes):
    return npp.main(training(data, out, **changes))


def start(*command, **environment):
    """Python in a process of its own, which can be killed, as in start("npp.py", "--model", "B")"""
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, **environment))
    STARTED.append(process)
    return process


def start_two_ranks(*command):
    """Two processes of a command, as torchrun starts them"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        ranks.append(start(*command, RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=port,
                           LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"))
    return ranks


def wait_for_step(out, step, seconds=60):
    """Return as soon as the step is in the log of a run in another process"""
    path = out / "log.jsonl"
    for _ in range(seconds * 20):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {seconds} s")


def checkpoint(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def weights(out, name="ckpt.pt"):
    return checkpoint(out, name)["model"]


def log(out):
    """The lines of the log, without the speed, which is never the same twice"""
    records = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("img_s", None)
        records.append(record)
    return records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished short training, to be copied"""
    folder = tmp_path_factory.mktemp("trained")
    assert train(write_data(folder / "data"), folder / "run") == 0
    return folder / "run"


def unfinished(trained, out):
    """The same run when it has reached its middle, where the stage of p = 2 has ended"""
    shutil.copytree(trained, out)
    os.remove(out / "ckpt_p1.pt")
    os.replace(out / "ckpt_p2.pt", out / "ckpt.pt")
    return out


def change_checkpoint(path, keys, value):
    """Give the entry at saved[key][key].. another value, or remove it if that is GONE"""
    saved = torch.load(path, weights_only=True)
    inner = saved
    for key in keys[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    torch.save(saved, path)


def published_model():
    return small_model(vocab=32, classes=5, dim=128)


@pytest.fixture
def published(tmp_path):
    """A folder of weights as LlamaGen publishes them, which tell neither heads nor grid, and of a
    tokenizer
    """
    torch.save({"model": published_model().state_dict()}, tmp_path / "c2i.pt")
    vq = tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32)
    tokenizer.save_tokenizer(tmp_path / "vq.pt", vq)
    return tmp_path


def sampling(published, **values):
    """The arguments that sample from the published weights"""
    return flags(sample=published / "c2i.pt", tokenizer=published / "vq.pt", **values)


def tokenize(*words, **values):
    """A command of tokenizer.py"""
    return tokenizer.main([str(word) for word in words] + flags(**values))


def refuses(capsys, arguments, *words):
    """Bad input gives exit code 2 and one line on stderr, in which the words are"""
    assert npp.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    for word in words:
        assert word in message, message


# ---- 1. Next patch prediction --------------------------------------------------------------------

@pytest.mark.parametrize("p", PATCH_EDGES)
def test_patches_and_targets_equal_naive_loops(p):
    h = 8
    x = torch.randn(2, h * h, 3)
    codes = torch.arange(2 * h * h).view(2, h * h)
    averages = npp.patchify(x, p)
    targets = npp.patch_targets(codes, p)
    positions = torch.arange(h * h).view(h, h)
    for b in range(2):
        for row in range(h // p):
            for column in range(h // p):
                block = positions[row * p : row * p + p, column * p : column * p + p].flatten()
                patch = row * (h // p) + column
                torch.testing.assert_close(averages[b, patch], x[b, block].mean(0))
                assert targets[b, patch].tolist() == codes[b, block].tolist()


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_loss_equals_cross_entropy_on_repeated_logits(p):
    targets = torch.randint(7, (2, 4, p * p))
    logits = torch.randn(2, 4, 7)
    repeated = repeat(logits, "b patch v -> (b patch k) v", k=p * p)
    expected = F.cross_entropy(repeated, targets.flatten())
    torch.testing.assert_close(npp.npp_loss(logits, targets), expected)


def test_p1_is_plain_next_token_prediction():
    x = torch.full((1, 16, 2), 0.3)
    assert torch.equal(npp.patchify(x, 1), x)
    model = small_model()
    codes = torch.randint(11, (3, 16))
    labels = torch.tensor([0, 1, 2])
    logits = model(codes, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model.loss(codes, labels), expected)


@pytest.mark.parametrize("spans", [
    [(1, 0, 100)],
    [(2, 0, 50), (1, 50, 100)],
    [(4, 0, 25), (2, 25, 50), (1, 50, 100)],
    [(8, 0, 12), (4, 12, 25), (2, 25, 50), (1, 50, 100)],
])
def test_stages_end_where_the_paper_says(spans):
    patches = [p for p, first, end in spans]
    for p, first, end in spans:
        assert npp.stage(first, 100, patches, 0.5) == (p, first, end)
        assert npp.stage(end - 1, 100, patches, 0.5) == (p, first, end)


def test_the_stage_before_the_last_ends_at_the_share_lam_of_the_steps():
    assert npp.stage(79, 100, (2, 1), 0.8)[0] == 2
    assert npp.stage(80, 100, (2, 1), 0.8)[0] == 1


def test_learning_rate_at_every_boundary():
    def lr(step, warmup=5, patches=(2, 1)):
        return npp.lr_at(step, total=200, patches=patches, lam=0.5, lr=1.0, lr_min=0.1,
                         warmup=warmup, decay_frac=0.2)

    # Each stage starts afresh.
    for first in (0, 100):
        warming = [lr(first + i) for i in range(6)]
        assert warming == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
        assert lr(first + 80) == pytest.approx(1.0)
        assert lr(first + 90) == pytest.approx(0.1 + 0.9 / 2)
        assert lr(first + 99) == pytest.approx(0.1 + 0.9 / 20)

    # A warm-up takes at most a tenth of its stage, which is 10 steps.
    assert lr(0, warmup=1000) == pytest.approx(0.1)
    assert lr(9, warmup=1000) == 1.0
    assert lr(10, warmup=1000) == 1.0
    assert lr(0, warmup=0) == 1.0
    assert lr(100, patches=(1,)) == 1.0


def test_a_decay_never_rises():
    rates = []
    for step in range(200):
        rates.append(npp.lr_at(step, total=200, patches=(2, 1), lam=0.5, lr=1e-6, lr_min=1e-5,
                               warmup=5, decay_frac=0.2))
    assert max(rates) == rates[99] == 1e-6


# ---- 2. Rotary positions -------------------------------------------------------------------------

def test_rotary_scores_depend_on_relative_positions_only():
    h = 6
    rope = npp.rope_2d(h, 16)
    q = torch.randn(1, 1, 1, 16)
    k = torch.randn(1, 1, 1, 16)

    def at(x, row, column):
        return npp.rotate(x, rope[1 + row * h + column][None])

    score = (at(q, 0, 1) * at(k, 2, 3)).sum()
    moved_together = (at(q, 3, 2) * at(k, 5, 4)).sum()
    rows_and_columns_swapped = (at(q, 0, 1) * at(k, 3, 2)).sum()
    torch.testing.assert_close(score, moved_together)
    assert (score - rows_and_columns_swapped).abs() > 1e-3
    assert rope.shape == (1 + h * h, 8, 2)
    assert rope[0].abs().max() == 0


# ---- 3. The transformer --------------------------------------------------------------------------

@pytest.mark.parametrize("p", PATCH_EDGES)
def test_logits_loss_gradient_and_rope_equal_the_official_code(golden, p):
    official, model = golden
    codes = official["codes"]
    labels = official["labels"]
    logits = model(codes, labels, p)
    expected = official[f"logits_p{p}"]
    if p > 1:
        # The official code repeats the logits of a patch for each of its K codes.
        expected = expected[:, 0]
    assert relative(logits, expected.reshape(logits.shape)) < 1e-5

    model.zero_grad()
    loss = model.loss(codes, labels, p)
    loss.backward()
    norm = torch.stack([w.grad.norm() for w in model.parameters()]).norm()
    assert loss.item() == pytest.approx(official[f"loss_p{p}"].item(), rel=1e-5)
    assert norm.item() == pytest.approx(official[f"gradnorm_p{p}"].item(), rel=1e-5)

    rope = npp.rope_2d(model.grid // p, model.head_dim)
    assert relative(rope, official[f"rope_p{p}"]) < 1e-5


@pytest.mark.parametrize("name, millions", [
    ("B", 110.888),
    ("L", 342.9),
    ("XL", 774.7),
    ("XXL", 1411.0),
    ("3B", 3096.7),
])
def test_sizes_have_the_published_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        model = npp.Transformer(**npp.SIZES[name], vocab=16384, classes=1000, grid=16)
    count = sum(w.numel() for w in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("p", PATCH_EDGES)
def test_no_gradient_reaches_the_future(p):
    model = small_model(grid=8)
    codes = torch.randint(11, (1, 64))
    labels = torch.tensor([1])
    embedded = model.tok_embeddings(codes).detach().requires_grad_()

    # The gradient is taken at what the table returns and not at the table itself, where positions
    # with the same code would share a row.
    def embed(codes):
        return embedded

    model.tok_embeddings.forward = embed
    for i in range(64 // p**2):
        loss = model(codes, labels, p)[0, i].logsumexp(0)
        gradient = torch.autograd.grad(loss, embedded)[0]
        seen = npp.patchify(gradient.abs(), p).sum(-1)[0] > 0
        assert seen[:i].all()
        assert not seen[i:].any()


@torch.no_grad()
@pytest.mark.parametrize("p", (1, 2))
def test_cached_logits_equal_uncached(p):
    model = small_model()
    codes = torch.randint(11, (3, 16))
    labels = torch.tensor([0, 1, 3])
    positions = 16 // p**2
    x = model.embed_patches(codes, p)
    x = torch.cat([model.embed_class(labels), x[:, :-1]], dim=1)
    rope = npp.rope_2d(4 // p, model.head_dim)
    caches = [npp.KVCache(3, 2, positions, model.head_dim, like=x) for _ in model.layers]
    cached = []
    for i in range(positions):
        # Compiled sampling, too, passes a mask that is longer than the positions filled so far.
        length = positions
        if i < positions // 2:
            length = positions // 2
        mask = (torch.arange(length) <= i)[None]
        cached.append(model.next_logits(x[:, i : i + 1], rope[i : i + 1], caches,
                                        torch.tensor([i]), mask))
    torch.testing.assert_close(torch.stack(cached, dim=1), model(codes, labels, p))


def test_first_loss_is_the_log_of_the_vocabulary():
    model = npp.Transformer(2, 2, 32, vocab=50, classes=3, grid=4)
    loss = model.loss(torch.randint(50, (2, 16)), torch.tensor([0, 1]), 2)
    assert loss.item() == pytest.approx(math.log(50), abs=1e-6)


def test_dropout_acts_in_training_only_and_never_on_labels():
    model = npp.Transformer(2, 2, 32, vocab=11, classes=3, grid=4, dropout=0.5)
    torch.nn.init.normal_(model.output.weight)
    codes = torch.randint(11, (2, 16))
    labels = torch.tensor([0, 1])
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))
    model.eval()
    assert torch.equal(model(codes, labels), model(codes, labels))
    without = small_model().train()
    assert torch.equal(without(codes, labels), without(codes, labels))


def test_bfloat16_weights_keep_a_float32_rope():
    model = small_model()
    codes = torch.randint(11, (2, 16))
    labels = torch.tensor([0, 1])
    exact = model(codes, labels)
    rounded = model.bfloat16()(codes, labels)
    assert rounded.dtype == torch.float32
    assert relative(rounded, exact) < 0.05


def test_attention_in_training_runs_in_the_flash_kernel():
    model = small_model(grid=8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where that kernel cannot be used
        model.loss(torch.randint(11, (2, 64)), torch.tensor([0, 1]), 2).backward()


# ---- 4. Sampling ---------------------------------------------------------------------------------

def test_codes_follow_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    u = torch.tensor([[0.0, 0.49, 0.51, 0.76, 1 - 2**-24]])
    assert npp.choose(logits, u).tolist() == [[0, 0, 1, 2, 2]]
    many = npp.choose(logits, torch.rand(1, 20000))[0]
    shares = torch.bincount(many) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize("u", (0.0, 0.5, 1 - 2**-24))
def test_filters_keep_only_the_likeliest_codes(u):
    logits = torch.tensor([[0.05, 0.5, 0.05, 0.3, 0.1]]).log()
    u = torch.tensor([[u]])
    assert npp.choose(logits, u, top_k=1).item() == 1
    assert npp.choose(logits, u, top_k=2).item() in (1, 3)
    assert npp.choose(logits, u, top_p=0.4).item() == 1  # the code that crosses top_p stays
    assert npp.choose(logits, u, top_p=0.6).item() in (1, 3)
    assert npp.choose(logits, u, temperature=0).item() == 1


@pytest.mark.parametrize("scale", (1, 2))
def test_greedy_samples_equal_the_official_code(golden, scale):
    official, model = golden
    codes = npp.generate(model, official["labels"], cfg_scale=scale, top_k=1)
    assert torch.equal(codes, official[f"greedy_cfg{scale}"].long())


@pytest.mark.parametrize("p", (1, 2))
def test_top_k_1_is_argmax_at_every_position(p):
    model = small_model()
    labels = torch.tensor([0, 1, 2])
    codes = npp.generate(model, labels, top_k=1, p=p)
    likeliest = model(codes, labels, p).argmax(-1, keepdim=True)
    assert torch.equal(npp.patch_targets(codes, p), likeliest.expand(-1, -1, p * p))


def test_guidance_1_is_conditional_and_0_unconditional():
    model = small_model()
    labels = torch.tensor([0, 1, 2])
    null_labels = torch.full_like(labels, model.classes)
    noise = torch.rand(3, 16)
    conditional = npp.generate(model, labels, noise=noise)
    unconditional = npp.generate(model, null_labels, noise=noise)
    # At exactly 1 guidance is left out, so the test stays a little above.
    scale_1 = npp.generate(model, labels, cfg_scale=1 + 1e-7, noise=noise)
    scale_0 = npp.generate(model, labels, cfg_scale=0, noise=noise)
    assert torch.equal(conditional, scale_1)
    assert torch.equal(unconditional, scale_0)
    assert not torch.equal(conditional, unconditional)


def test_an_image_does_not_depend_on_its_batch():
    model = small_model()
    labels = torch.tensor([0, 1, 2, 0])
    together = npp.generate(model, labels, cfg_scale=2, noise=npp.noise_of(7, range(4), 16))
    for i in range(4):
        alone = npp.generate(model, labels[i : i + 1], cfg_scale=2, noise=npp.noise_of(7, [i], 16))
        assert torch.equal(alone[0], together[i])


def test_patchwise_sampling_draws_every_code_of_a_patch_from_one_distribution():
    model = small_model()
    # All codes of a patch get the same random number, so only one distribution makes them equal.
    noise = repeat(torch.rand(2, 2, 2), "b h w -> b (h p1 w p2)", p1=2, p2=2)
    codes = npp.generate(model, torch.tensor([0, 1]), noise=noise, p=2)
    patches = npp.patch_targets(codes, 2)
    assert (patches == patches[..., :1]).all()
    assert len(patches.unique()) > 1


def test_sampling_works_under_autocast():
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        codes = npp.generate(model, torch.tensor([0, 1]), 2.0, noise=torch.rand(2, 16))
    assert codes.shape == (2, 16)


@pytest.mark.slow  # half a minute of compiling, by a C++ compiler that must be there
@pytest.mark.parametrize("p", (1, 2))
def test_compiled_sampling_gives_the_same_codes_for_every_batch(p):
    torch._dynamo.reset()
    model = small_model()
    labels = torch.tensor([0, 1])
    cached = npp.CompiledModel(model, 4, p)
    for _ in range(2):
        noise = torch.rand(2, 16)
        compiled = npp.generate(model, labels, 2.0, noise=noise, p=p, cached=cached)
        assert torch.equal(compiled, npp.generate(model, labels, 2.0, noise=noise, p=p))


@gpu
@pytest.mark.parametrize("p", (1, 2))
def test_graphs_on_a_gpu_draw_what_single_steps_draw(p):
    model = small_model(grid=8).cuda()
    labels = torch.tensor([0, 1, 2], device="cuda")
    cached = npp.CompiledModel(model, 6, p)  # one for all batches, which replay its graphs
    for _ in range(3):
        noise = torch.rand(3, 64, device="cuda")
        plain = npp.generate(model, labels, 2.0, noise=noise, p=p)
        graphs = npp.generate(model, labels, 2.0, noise=noise, p=p, cached=cached)
        assert torch.equal(plain, graphs)


def test_logits_that_are_no_numbers_are_refused():
    model = small_model()
    model.output.weight.data[0, 0] = math.nan
    with pytest.raises(npp.BadInput, match="NaN"):
        npp.generate(model, torch.tensor([0, 1]))


# ---- 5. Data -------------------------------------------------------------------------------------

def test_an_epoch_visits_every_image_once(data):
    images = npp.Codes(data)
    cfg = npp.Config(batch=36, class_dropout=0)
    order = [npp.epoch_order(96, 0, epoch) for epoch in range(3)]
    visits = np.concatenate(order)
    for step in range(8):
        labels = npp.batch_at(images, step, cfg)[1]
        expected = images.labels[visits[step * 36 : step * 36 + 36]]
        assert labels.tolist() == expected.tolist()
    assert sorted(order[0]) == list(range(96))
    assert not np.array_equal(order[0], order[1])


def test_batches_do_not_depend_on_ranks(data):
    images = npp.Codes(data)
    cfg = npp.Config(batch=12)
    codes, labels = npp.batch_at(images, 5, cfg)
    for rank in range(3):
        rows = slice(rank * 4, rank * 4 + 4)
        codes_of_rank, labels_of_rank = npp.batch_at(images, 5, cfg, rows)
        assert torch.equal(codes_of_rank, codes[rows])
        assert torch.equal(labels_of_rank, labels[rows])
    other_seed = npp.Config(batch=12, seed=1)
    assert not torch.equal(codes, npp.batch_at(images, 5, other_seed)[0])


def test_views_and_null_labels_are_drawn_at_random(data):
    images = npp.Codes(data)
    codes, labels = npp.batch_at(images, 0, npp.Config(batch=4000))
    null_labels = (labels == 3).float()
    assert null_labels.mean().item() == pytest.approx(0.1, abs=0.02)
    order = np.concatenate([npp.epoch_order(96, 0, epoch) for epoch in range(42)])[:4000]
    first_view = (codes.numpy() == images.codes[order, 0]).all(1)
    assert 0.4 < first_view.mean() < 0.75  # a third of the images have two equal views


# ---- 6. Training ---------------------------------------------------------------------------------

def test_one_image_can_be_learned_by_heart(tmp_path):
    data = write_data(tmp_path / "one", images=1, views=1)
    out = tmp_path / "run"
    assert train(data, out, steps=200, batch=8, lr=0.15, class_dropout=0.0, save_every=200) == 0
    assert log(out)[-1]["loss"] < 0.01
    codes = npp.Codes(data)
    model = npp.load_model(out / "ckpt.pt")
    drawn = npp.generate(model, torch.tensor([codes.labels[0]]))
    assert drawn[0].tolist() == codes.codes[0, 0].tolist()


def test_fine_tuning_starts_from_given_weights(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    tuned = tmp_path / "tuned"
    data_of_5_classes = write_data(tmp_path / "other", classes=5)
    assert train(data_of_5_classes, tuned, init=out / "ckpt.pt", steps=2, lr=0.0, lr_min=0.0) == 0
    name = "layers.0.attention.wo.weight"
    assert torch.equal(weights(out)[name], weights(tuned)[name])
    assert weights(tuned)["cls_embedding.embedding_table.weight"].shape[0] == 6
    # The first run did not start from given weights, so it is not this one.
    assert train(data, out, init="w.pt") == 2


def test_two_ranks_and_accumulation_train_as_one(data, tmp_path):
    two_ranks = start(*TORCHRUN, "npp.py", *training(data, tmp_path / "two", micro_batch=2))
    assert train(data, tmp_path / "one") == 0
    assert train(data, tmp_path / "micro", micro_batch=2) == 0
    assert two_ranks.wait(120) == 0, two_ranks.stderr.read()
    for name in ("two", "micro"):
        for one, other in zip(log(tmp_path / "one"), log(tmp_path / name), strict=True):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        one = weights(tmp_path / "one", "ckpt_p2.pt")["tok_embeddings.weight"]
        other = weights(tmp_path / name, "ckpt_p2.pt")["tok_embeddings.weight"]
        assert relative(one, other) < 1e-2  # Adam divides tiny gradients by themselves


@pytest.mark.slow
def test_each_patch_size_is_compiled_once_and_whole():
    torch._dynamo.reset()
    graphs = CompileCounter()
    model, _, codes, labels = small_training()
    loss_of = torch.compile(npp.Loss(model), backend=graphs, dynamic=False, fullgraph=True)
    for p in (2, 2, 1, 1):
        loss_of(codes, labels, p).backward()
    assert graphs.frame_count == 2


@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    model, optimizer, codes_on_cpu, labels_on_cpu = small_training("cuda")

    def step():
        codes = codes_on_cpu.pin_memory().to("cuda", non_blocking=True)
        labels = labels_on_cpu.pin_memory().to("cuda", non_blocking=True)
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


# ---- 7. What a run leaves, and how it goes on ----------------------------------------------------

def test_a_run_leaves_logs_checkpoints_and_no_rubbish(trained):
    files = sorted(os.listdir(trained))
    assert files == ["ckpt.pt", "ckpt_p1.pt", "ckpt_p2.pt", "lock", "log.jsonl"]
    records = log(trained)
    assert [x["step"] for x in records] == [4, 6, 8, 12, 16, 18, 20, 24]
    assert [x["p"] for x in records] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert [x["step"] for x in records if "val_loss" in x] == [8, 12, 16, 24]
    assert records[0]["loss"] == pytest.approx(math.log(16), abs=0.2)
    assert records[-1]["loss"] < 2
    assert same(weights(trained), weights(trained, "ckpt_p1.pt"))


def test_killed_and_resumed_is_bit_identical(data, tmp_path):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    # It is killed once in each stage, and not at a multiple of 6, where a checkpoint is saved.
    for step in (8, 40):
        process = start("npp.py", *training(data, broken, steps=60, dropout=0.1))
        wait_for_step(broken, step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(data, broken, steps=60, dropout=0.1) == 0
    assert train(data, whole, steps=60, dropout=0.1) == 0
    for name in ("ckpt_p2.pt", "ckpt_p1.pt", "ckpt.pt"):
        assert same(weights(whole, name), weights(broken, name))
    assert log(whole) == log(broken)


def test_resume_needs_nothing_but_the_checkpoint(trained, data, tmp_path):
    broken_log = unfinished(trained, tmp_path / "run")
    (broken_log / "log.jsonl").write_bytes(
        b'{"step": 4, "p": 2}\n'
        b'{"step": 4}{"step": 8}\n'
        b'\0\0\0\n'
        b'{"p": 2}\n'
        b'[]\n'
        b'{"step": 1')
    assert train(data, broken_log) == 0
    assert [x["step"] for x in log(broken_log)] == [4, 16, 18, 20, 24]
    no_log = unfinished(trained, tmp_path / "other")
    os.remove(no_log / "log.jsonl")
    assert train(data, no_log) == 0


def test_an_older_checkpoint_that_lacks_a_flag_still_resumes(trained, data, tmp_path, capsys):
    out = unfinished(trained, tmp_path / "run")
    change_checkpoint(out / "ckpt.pt", ("config", "clip"), GONE)
    assert train(data, out, clip=2) == 2  # the default, which the checkpoint gets, is 1
    assert "clip is 1.0 there, 2.0 here" in capsys.readouterr().err
    assert train(data, out) == 0


def test_a_finished_run_says_so_and_another_recipe_is_refused(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, steps=4) == 0
    before = weights(out)
    assert train(data, out, steps=4, micro_batch=4, log_every=1) == 0
    assert "is finished" in capsys.readouterr().out
    assert train(data, out, steps=4, lam=0.25, seed=3) == 2
    message = capsys.readouterr().err
    assert "lam is 0.5 there, 0.25 here" in message
    assert "seed is 0 there, 3 here" in message
    assert same(before, weights(out))


def test_a_finished_run_is_not_touched(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, steps=4) == 0

    def times():
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    before = times()
    assert train(data, out, steps=4) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == times()


def test_signals_save_before_the_end(data, tmp_path):
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = tmp_path / str(number)
        processes[number] = start("npp.py", *training(data, out, steps=4000, save_every=4000,
                                                      eval_every=4000))
    for number, process in processes.items():
        wait_for_step(tmp_path / str(number), 8)
        process.send_signal(number)
    for number, process in processes.items():
        assert process.wait(60) == 130, process.stderr.read()
        assert checkpoint(tmp_path / str(number))["step"] >= 8
        assert "goes on from there" in process.stdout.read()


def test_a_closed_pipe_saves_before_the_end(data, tmp_path):
    out = tmp_path / "run"
    process = start("npp.py", *training(data, out, steps=4000, save_every=4000, eval_every=4000))
    process.stdout.readline()
    process.stdout.close()  # head -1 does the same
    assert process.wait(60) == 130, process.stderr.read()
    assert checkpoint(out)["step"] > 0


NPP_WITH_AN_ENDLESS_STEP = """
import signal, sys, time, npp

def endless(*arguments):  # to compile takes long, too
    print("in a step", flush=True)
    time.sleep(60)

npp.Watcher.after_step = endless
signal.signal(signal.SIGTERM, npp.interrupt)
sys.exit(npp.main(sys.argv[1:]))
"""


def test_a_second_signal_ends_training_at_once(data, tmp_path):
    process = start("-c", NPP_WITH_AN_ENDLESS_STEP, *training(data, tmp_path / "run"))
    while "in a step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # a second signal that comes sooner is taken for torchrun's echo
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert process.stderr.read() == "npp.py: stopped\n"


def test_two_trainings_of_one_folder_are_refused(data, tmp_path, capsys):
    out = tmp_path / "run"
    process = start("npp.py", *training(data, out, steps=4000))
    wait_for_step(out, 8)
    refuses(capsys, training(data, out, steps=4000), "in use")
    process.kill()
    process.communicate()
    assert train(data, out, steps=4000, lam=0.25) == 2  # the lock has ended with its process
    assert "lam is 0.5 there" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, lr=1e30, clip=1e30, save_every=100, log_every=4) == 2
    assert "the loss is nan at step" in capsys.readouterr().err
    for weight in weights(out).values():
        assert weight.isfinite().all()


NPP_WITH_A_FULL_DISK = """
import resource, sys, npp
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(npp.main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_is_named(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    before = weights(out)
    process = start("-c", NPP_WITH_A_FULL_DISK, *training(data, out))
    _, message = process.communicate()
    assert process.returncode == 2, message
    assert message.count("\n") == 1, message
    assert "ckpt.pt: cannot be written" in message
    assert same(before, weights(out))
    assert not (out / "ckpt.pt.part").exists()


# ---- 8. Samples from a checkpoint ----------------------------------------------------------------

@pytest.mark.parametrize("layout", ("model", "module", "state_dict", None))
def test_published_weights_load_from_every_layout(tmp_path, layout):
    model = published_model()
    saved = model.state_dict()
    if layout:
        # The training checkpoints of LlamaGen carry their flags.
        saved = {layout: saved, "args": argparse.Namespace(gpt_model="GPT-B")}
    torch.save(saved, tmp_path / "weights.pt")
    loaded = npp.load_model(tmp_path / "weights.pt", grid=6)
    assert loaded.n_head == 2
    assert loaded.grid == 6
    assert not loaded.training
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ("B", "L", "XL", "XXL", "3B"))
def test_heads_follow_from_the_width(tmp_path, name):
    size = npp.SIZES[name]
    with torch.device("meta"):
        model = npp.Transformer(n_layer=1, n_head=1, dim=size["dim"], vocab=16, classes=3, grid=4)
    state = {}
    for key, weight in model.state_dict().items():
        # Every place of the tensor shows the same number, so the file stays small.
        state[key] = torch.zeros(()).expand(weight.shape)
    torch.save(state, tmp_path / "weights.pt")
    assert npp.load_model(tmp_path / "weights.pt").n_head == size["n_head"]


def test_published_weights_sample_without_a_data_set_at_any_size(published, tmp_path):
    arguments = sampling(published, data="none", image_size=24, n=5, classes="4,2")
    assert npp.main(arguments + flags(out=tmp_path / "a.npz", image_size_eval=0)) == 0
    assert npp.main(arguments + flags(out=tmp_path / "b.npz", image_size_eval=16)) == 0
    assert npp.main(arguments + flags(out=tmp_path / "grid.png")) == 0
    at_24 = np.load(tmp_path / "a.npz")
    at_16 = np.load(tmp_path / "b.npz")
    assert at_24["arr_0"].shape == (5, 24, 24, 3)
    assert at_24["labels"].tolist() == [4, 2, 4, 2, 4]

    model = npp.load_model(published / "c2i.pt", grid=6)
    codes = npp.generate(model, torch.from_numpy(at_24["labels"]), cfg_scale=2.0,
                         noise=npp.noise_of(0, range(5), 36))
    vq = tokenizer.load_tokenizer(published / "vq.pt")
    images = vq.decode(codes.view(5, 6, 6))
    assert np.array_equal(at_24["arr_0"], tokenizer.to_uint8(images))
    # Images are resized before they are rounded, as in LlamaGen.
    images = F.interpolate(images, (16, 16), mode="bicubic")
    assert np.array_equal(at_16["arr_0"], tokenizer.to_uint8(images))


def test_samples_are_balanced_or_random_by_seed_and_index(published, tmp_path):
    def labels(**values):
        out = tmp_path / "x.npz"
        assert npp.main(sampling(published, image_size=4, out=out, **values)) == 0
        return np.load(out)["labels"].tolist()

    balanced = labels(n=10)
    assert np.bincount(balanced).tolist() == [2, 2, 2, 2, 2]
    random = labels(n=10, classes="random")
    assert random == labels(n=20, classes="random")[:10]
    assert random != balanced
    assert random != labels(n=10, classes="random", seed=1)


def test_any_number_of_ranks_makes_the_same_samples(published, tmp_path):
    arguments = sampling(published, image_size=16, n=11, micro_batch=3)
    one = tmp_path / "1.npz"
    two = tmp_path / "2.npz"
    two_ranks = start(*TORCHRUN, "npp.py", *arguments, "--out", str(two))
    assert npp.main(arguments + flags(out=one)) == 0
    _, message = two_ranks.communicate(timeout=90)
    assert two_ranks.returncode == 0, message
    assert len(np.load(one)["arr_0"]) == 11
    assert one.read_bytes() == two.read_bytes()


NPP_AND_THE_NAMES_OF_ITS_THREADS = """
import pathlib, sys, npp
npp.main(sys.argv[1:])
for path in pathlib.Path("/proc/self/task").glob("*/comm"):
    print("thread:", path.read_text())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="lists threads as Linux does")
def test_ranks_end_without_threads(published, tmp_path):
    """A thread of gloo that is left wakes as Python ends, and aborts the process now and then"""
    arguments = sampling(published, image_size=16, n=4, out=tmp_path / "x.npz")
    for rank in start_two_ranks("-c", NPP_AND_THE_NAMES_OF_ITS_THREADS, *arguments):
        out, _ = rank.communicate(timeout=90)
        assert "thread:" in out
        assert "gloo" not in out


def test_a_signal_while_sampling_leaves_one_line_and_no_file(published, tmp_path):
    out = tmp_path / "s.npz"
    part = tmp_path / "s.npz.part"
    arguments = sampling(published, image_size=32, n=100_000, micro_batch=2, out=out)
    process = start("npp.py", *arguments)
    process.stdout.readline()
    assert part.exists()
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message == "npp.py: stopped\n"
    assert not part.exists()
    assert not out.exists()


def write_images(folder):
    """Three images of cats and three of dogs, or rather of noise"""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(255, size=(16, 16 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def picture_size(columns, rows):
    """(width, height) of a grid of 16 x 16 images: four times as large, with lines between them"""
    return columns * 17 * 4 - 4, rows * 17 * 4 - 4


def test_own_images_become_codes_pictures_and_samples(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    vq = tmp_path / "tokenizer.pt"
    data = tmp_path / "data"
    assert tokenize("train", images, vq, image_size=16, steps=3, codebook_size=32,
                    ch_mult="1,1,1") == 0
    assert tokenize("encode", images, data, tokenizer=vq, image_size=16, split="train") == 0
    assert tokenize("encode", images, data, tokenizer=vq, image_size=16, split="val") == 0
    codes = np.load(data / "codes.npy")
    assert codes.shape == (6, 2, 16)
    assert codes.dtype == np.uint8
    assert np.load(data / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1]
    assert tokenize("reconstruct", images, tmp_path / "again.png", tokenizer=vq,
                    image_size=16) == 0
    assert "PSNR" in capsys.readouterr().out

    # Training draws ten images of each class.
    out = tmp_path / "run"
    assert train(data, out, steps=4) == 0
    for name in ("samples.png", "samples_p2.png", "samples_p1.png"):
        assert Image.open(out / name).size == picture_size(10, 2)

    # A sample does not depend on the batch that it is drawn in.
    def sample(path, **values):
        return npp.main(flags(sample=out / "ckpt.pt", out=path, **values))

    assert sample(tmp_path / "a.npz", n=5, micro_batch=0) == 0
    assert sample(tmp_path / "b.npz", n=5, micro_batch=2) == 0
    a = np.load(tmp_path / "a.npz")
    b = np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (5, 16, 16, 3)
    assert a["labels"].tolist() == [0, 1, 0, 1, 0]
    assert np.array_equal(a["arr_0"], b["arr_0"])

    assert sample(tmp_path / "dogs.png", n=6, classes="dogs,0") == 0
    assert Image.open(tmp_path / "dogs.png").size == picture_size(3, 2)


def write_images_of_many_kinds(folder):
    """40 clothes of four classes, in three formats, four colour modes and many shapes"""
    # JPEG knows no palette (P) and PNG no CMYK. WebP stays RGB, as all images were.
    modes = {
        "jpg": ("RGB", "L", "CMYK", "L"),
        "png": ("RGB", "L", "L", "P"),
        "webp": ("RGB", "RGB", "RGB", "RGB"),
    }
    with np.load(HERE / "data" / "fashion" / "reference.npz") as reference:
        images = reference["arr_0"]
        labels = reference["labels"]
    for i, row in enumerate(np.flatnonzero(labels < 4)[:40]):
        shape = (64 + 7 * (i % 9), 64 + 11 * (i % 5))
        kind = ("jpg", "png", "webp")[i % 3]
        mode = modes[kind][i // 3 % 4]
        picture = Image.fromarray(images[row]).resize(shape, Image.BICUBIC).convert(mode)
        path = folder / str(labels[row]) / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


@pytest.mark.slow
def test_dry_run_of_the_whole_recipe_at_64_pixels(tmp_path):
    images = write_images_of_many_kinds(tmp_path / "images")
    vq = tmp_path / "vq.pt"
    data = tmp_path / "codes"
    out = tmp_path / "run"
    samples = str(tmp_path / "samples.npz")
    tokenizer.save_tokenizer(vq, tokenizer.VQModel())  # VQ-16 with random weights
    assert tokenize("encode", images, data, tokenizer=vq, image_size=64) == 0
    assert np.load(data / "codes.npy").shape == (40, 2, 16)
    assert npp.main(flags(data=data, out=out, steps=20, batch=8, eval_every=10)) == 0
    records = log(out)
    assert records[0]["p"] == 2
    assert records[-1]["p"] == 1
    assert npp.main(flags(sample=out / "ckpt.pt", n=20, out=samples)) == 0
    assert fid.Images(samples)[:20].shape == (20, 64, 64, 3)


# ---- 9. The command line and the README ----------------------------------------------------------

def test_help_shows_every_flag_with_its_default_and_tinys(capsys):
    with pytest.raises(SystemExit) as stop:
        npp.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(npp.Config):
        assert f"    {field.name}: " in text
    assert "batch: int = 256" in text
    assert "images in a step, over all ranks" in text
    assert "steps 1200, batch 64, lr 0.008" in text


def test_tiny_brings_its_own_recipe_and_the_others_the_papers():
    tiny = npp.parse([])
    assert tiny.steps == npp.TINY["steps"]
    assert tiny.dropout == 0
    paper = npp.parse(["--model", "B"])
    assert paper.epochs == 300
    assert paper.steps == 0
    assert paper.lr == 1e-4
    assert paper.dropout == 0.1
    half = npp.parse(["--epochs", "0.5"])
    assert half.epochs == 0.5
    assert half.steps == 0
    for field in fields(npp.Config):
        assert type(field.default) is field.type


def test_readme_quotes_the_code_and_links_to_files_that_are_there():
    readme = (HERE / "README.md").read_text()
    code = (HERE / "npp.py").read_text()
    quotes = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert quotes
    for quote in quotes:
        assert quote in code
    for link in re.findall(r"\]\((?!http|#)(.*?)\)", readme):
        path = link.split("#")[0]
        assert (HERE / path).exists(), link


# ---- 10. Bad input: one line that names it, exit code 2 ------------------------------------------

@pytest.mark.parametrize("changes, word", [
    ("--model M", "model is M"),
    ("--patches 1,2", "patches is (1, 2)"),
    ("--patches 4,2", "decrease to 1"),
    ("--patches 3,1", "divisors"),
    ("--patches 0,1", "patches is (0, 1)"),
    ("--patches x", "patches"),
    ("--patches 4,2,1 --steps 2", "none is left for p = 4"),
    ("--steps 4 --lam 0.99", "none is left for p = 1"),
    ("--lam 1", "lam is 1.0"),
    ("--lam 0", "lam is 0.0"),
    ("--steps -1", "steps is -1"),
    ("--epochs nan", "epochs is nan"),
    ("--batch 0", "batch is 0"),
    (f"--batch {2**63}", "batch is 9223"),
    ("--micro_batch 3", "batch is 8"),
    ("--micro_batch -1", "micro_batch is -1"),
    ("--lr fast", "lr"),
    ("--lr -1", "lr is -1"),
    ("--lr inf", "lr is inf"),
    ("--clip 0", "clip is 0"),
    ("--dropout 1.5", "dropout is 1.5"),
    ("--class_dropout 2", "class_dropout is 2"),
    ("--seed -1", "seed is -1"),
    (f"--seed {10**30}", "seed is 1000"),
    ("--dtype float8", "dtype is float8"),
    ("--log_every 0", "log_every is 0"),
    ("--save_every 0", "save_every is 0"),
    ("--stepz 3", "stepz"),
    ("--data none", "none/meta.json"),
    ("--data 'no\nfolder'", "no folder/meta.json"),
    ("--out 'a\nb/c' --seed -1", "seed"),
    ("--init no.pt", "no.pt"),
    ("--tokenizer no.pt", "no.pt"),
    ("--classes 'class 9'", "class 9"),
    ("--sample c.pt --micro_batch -1", "micro_batch"),
    ("--sample c.pt --dtype float8", "dtype is float8, expected float32, bfloat16"),
    ("--sample c.pt --cfg_scale nan", "cfg_scale is nan"),
    ("--sample c.pt --cfg_scale inf", "cfg_scale is inf"),
    ("--sample c.pt --top_p 0", "top_p is 0"),
    ("--sample c.pt --top_p 1.5", "top_p is 1.5"),
    (f"--sample c.pt --n {10**30}", "n is 1000"),
])
def test_a_bad_flag_is_named(data, tmp_path, capsys, changes, word):
    out = tmp_path / "run"
    refuses(capsys, training(data, out) + shlex.split(changes), word)
    assert not out.exists()


def test_more_processes_than_gpus_are_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuses(capsys, training(data, tmp_path / "run"), "2 processes", "GPU: 1")


@pytest.mark.parametrize("name, content, word", [
    ("codes.npy", None, "missing"),
    ("codes.npy", b"\x93NUMPY\x01", "damaged"),
    ("meta.json", None, "meta.json"),
    ("meta.json", b"{", "meta.json"),
    ("meta.json", b'{"vocab": 16}', "grid"),
    ("meta.json", b"[" * 100_000, "RecursionError"),
])
def test_a_missing_or_damaged_file_of_data_is_named(data, tmp_path, capsys, name, content, word):
    os.remove(data / name)
    if content is not None:
        (data / name).write_bytes(content)
    refuses(capsys, training(data, tmp_path / "run"), name, word)


@pytest.mark.parametrize("name, value, word", [
    ("grid", "4", "grid is 4"),
    ("grid", 4.0, "is 4.0"),
    ("classes", "abc", "classes"),
    ("classes", [1, 2], "classes"),
])
def test_a_bad_value_in_meta_json_is_named(data, tmp_path, capsys, name, value, word):
    meta = json.loads((data / "meta.json").read_text())
    meta[name] = value
    (data / "meta.json").write_text(json.dumps(meta))
    refuses(capsys, training(data, tmp_path / "run"), "meta.json", word)


@pytest.mark.parametrize("name, array, words", [
    ("codes.npy", np.zeros((96, 2, 16), np.int64), ["int64", "uint8 or uint16"]),
    ("codes.npy", np.zeros((96, 2, 16), ">u2"), [">u2", "uint8 or uint16"]),
    ("codes.npy", np.zeros((0, 2, 16), np.uint8), ["(0, 2, 16)"]),
    ("codes.npy", np.zeros((96, 16), np.uint8), ["(96, 16)", "(images, views, 16)"]),
    ("codes.npy", np.zeros((96, 2, 15), np.uint8), ["(96, 2, 15)"]),
    ("codes.npy", np.full((96, 2, 16), 16, np.uint8), ["image ", "code 16", "0 to 15"]),
    ("codes_val.npy", np.full((32, 2, 16), 17, np.uint8), ["image 0", "code 17", "0 to 15"]),
    ("codes_val.npy", np.zeros((32, 2, 9), np.uint8), ["(32, 2, 9)"]),
    ("labels.npy", np.full(96, 3), ["3 to 3", "0 to 2"]),
    ("labels.npy", np.full(96, -1), ["-1 to -1"]),
    ("labels.npy", np.full(96, 0.5), ["float64"]),
    ("labels.npy", np.zeros(95, np.int64), ["(95,)", "(96,)"]),
])
def test_an_array_that_holds_no_codes_or_labels_is_named(data, tmp_path, capsys, name, array,
                                                          words):
    np.save(data / name, array)
    refuses(capsys, training(data, tmp_path / "run"), name, *words)


def test_an_error_of_the_second_rank_is_named_and_both_end(data, tmp_path):
    codes = np.load(data / "codes.npy")
    second_half_of_the_first_batch = npp.epoch_order(96, 0, 0)[4:8]
    codes[second_half_of_the_first_batch] = 255
    np.save(data / "codes.npy", codes)
    first, second = start_two_ranks("npp.py", *training(data, tmp_path / "run"))
    _, message_of_first = first.communicate(timeout=90)
    _, message_of_second = second.communicate(timeout=90)
    assert first.returncode == 2, message_of_first
    assert second.returncode == 2, message_of_second
    assert "code 255, expected 0 to 15" in message_of_second
    assert message_of_second.count("npp.py:") == 1
    assert "npp.py: another rank has ended" in message_of_first


def test_codes_of_another_tokenizer_are_refused(tmp_path, capsys):
    data = write_data(tmp_path / "data", tokenizer="tokenizer.pt", tokenizer_sha256="0" * 64)
    vq = tokenizer.VQModel(16, 8, 32, (1, 1, 1), 32)
    tokenizer.save_tokenizer(data / "tokenizer.pt", vq)
    refuses(capsys, training(data, tmp_path / "run"), "sha256", "0000")


def test_weights_of_another_shape_are_refused(data, tmp_path, capsys):
    model = npp.Transformer(4, 4, 128, vocab=20, classes=3, grid=4)  # the data have 16 codes
    torch.save({"model": model.state_dict()}, tmp_path / "other.pt")
    arguments = training(data, tmp_path / "run", init=tmp_path / "other.pt")
    refuses(capsys, arguments, "size mismatch")
    assert not (tmp_path / "run").exists()


class Evil:
    """A pickle that runs code where it is loaded without care"""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_bad_checkpoints_are_refused_and_run_no_code(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    path = out / "ckpt.pt"
    assert train(data, out, steps=4) == 0
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps({"model": Evil()})):
        path.write_bytes(content)
        refuses(capsys, training(data, out, steps=8), "ckpt.pt")
        refuses(capsys, flags(sample=path), "ckpt.pt")
        assert path.read_bytes() == content  # what could be rescued by hand is not lost
    assert not os.path.exists("hacked")
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(3, 4)}}, path)
    refuses(capsys, flags(sample=path), "expected a transformer")
    refuses(capsys, training(data, out), "expected a checkpoint of npp.py")


def test_a_flipped_bit_in_a_checkpoint_is_found(trained, data, tmp_path, capsys):
    out = unfinished(trained, tmp_path / "run")
    path = out / "ckpt.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refuses(capsys, training(data, out), "ckpt.pt", "damaged")
    refuses(capsys, flags(sample=path), "ckpt.pt", "damaged")


@pytest.mark.parametrize("keys, value", [
    (["step"], GONE),
    (["step"], "x"),
    (["step"], 1000),
    (["step"], -1),
    (["config"], 3),
    (["model"], GONE),
    (["model", "norm.weight"], GONE),
    (["optimizer"], GONE),
    (["optimizer", "param_groups"], GONE),
    (["optimizer", "state"], {}),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(3)),
])
def test_a_checkpoint_with_wrong_contents_is_refused(trained, data, tmp_path, capsys, keys, value):
    out = unfinished(trained, tmp_path / "run")
    change_checkpoint(out / "ckpt.pt", keys, value)
    refuses(capsys, training(data, out), "ckpt.pt: expected a checkpoint of npp.py")


@pytest.mark.parametrize("keys, value, word", [
    (["grid"], -4, "grid"),
    (["grid"], "x", "grid"),
    (["grid"], 4.5, "grid"),
    (["classes"], None, "None"),
    (["classes"], ["a"] * 9, "9 names of 3 classes"),
    (["config", "model"], "M", "'M'"),
    (["model", "layers.3.attention.wo.weight"], GONE, "layers.3.attention.wo"),
    (["model", "norm.weight"], torch.full([128], math.nan), "norm.weight holds NaN"),
])
def test_a_checkpoint_that_cannot_be_sampled_is_refused(trained, tmp_path, capsys, keys, value,
                                                         word):
    path = tmp_path / "ckpt.pt"
    shutil.copy(trained / "ckpt.pt", path)
    change_checkpoint(path, keys, value)
    refuses(capsys, flags(sample=path), "ckpt.pt", word)


@pytest.mark.parametrize("changes, words", [
    ("--image_size 2", ["image_size is 2", "expected 4"]),
    ("--image_size 25", ["image_size is 25", "expected 24"]),
    ("--image_size_eval -1", ["image_size_eval is -1"]),
    ("--out samples.jpg", ["samples.jpg", "expected a .png or an .npz"]),
    ("--classes 5", ["classes is 5", "0 to 4"]),
    ("--tokenizer ''", ["c2i.pt", "--tokenizer"]),
    ("--sample vq.pt", ["vq.pt", "expected a transformer"]),
])
def test_what_cannot_be_sampled_is_refused(published, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(published)
    arguments = flags(sample="c2i.pt", tokenizer="vq.pt", image_size=24, out="x.npz")
    refuses(capsys, arguments + shlex.split(changes), *words)
    assert not os.path.exists("x.npz")
