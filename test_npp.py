"""What npp.py claims, as tests: python -m pytest test_npp.py"""

import argparse
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.testing import CompileCounter

import npp
import tokenizer
from conftest import (HERE, class_folder, flags, full_disk, random_images, refuses, start,
                      start_two_ranks, write_pickle_with_code)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- Helpers -------------------------------------------------------------------------------------

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


def small_model(vocab=11, classes=3, grid=4, dim=32, dropout=0.0):
    """Two layers with two heads, the same weights in every call"""
    torch.manual_seed(0)
    model = npp.Transformer(2, 2, dim, vocab, classes, grid, dropout)
    # The output weights start as zeros, and those would hide every difference.
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def relative(a, b):
    """The largest difference between a and b, as a share of the largest number in b"""
    return ((a - b).abs().max() / b.abs().max()).item()


def same(a, b):
    """Whether two state dicts have the same names and bit-identical tensors"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_data(folder, images=96, classes=3, views=2):
    """A data set without a tokenizer: codes that depend on class and position"""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    shift = rng.integers(3, size=(images, views, 1))
    codes = (labels[:, None, None] + np.arange(16) + shift) % 16        # (images, views, 4 * 4)
    codes = codes.astype(np.uint8)
    folder.mkdir()
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "codes_val.npy", codes[:32])
    np.save(folder / "labels_val.npy", labels[:32])
    names = [f"class {i}" for i in range(classes)]
    meta = {"vocab": 16, "grid": 4, "image_size": 16, "classes": names, "tokenizer": None,
            "tokenizer_sha256": None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of images and what the commands of tokenizer.py make of them"""
    folder = tmp_path_factory.mktemp("own")
    images = str(class_folder(folder / "images", random_images(6), names=("cats", "dogs")))
    vq = str(folder / "vq.pt")
    small = flags(image_size=16, codebook_size=32, ch_mult="1,1,1")
    assert tokenizer.main(["train", images, vq, *small, *flags(steps=3)]) == 0
    for split in ("train", "val"):
        arguments = flags(tokenizer=vq, split=split)
        assert tokenizer.main(["encode", images, str(folder / "data"), *arguments]) == 0
    return folder


def training(data, out, **changes):
    """The arguments of a short training, with some of its values changed"""
    values = {"data": data, "out": out, "steps": 24, "batch": 8, "lr": 0.03, "log_every": 4,
              "eval_every": 6}
    values.update(changes)
    return flags(**values)


def train(data, out, **changes):
    return npp.main(training(data, out, **changes))


def checkpoint(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def weights(out, name="ckpt.pt"):
    return checkpoint(out, name)["model"]


def log(out):
    """The lines of the log, without the speed, which is never the same twice"""
    lines = (out / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    for line in lines:
        del line["img_s"]
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished short training, to be copied"""
    folder = tmp_path_factory.mktemp("trained")
    assert train(write_data(folder / "data"), folder / "run") == 0
    return folder / "run"


def unfinished(trained, out):
    """The same run at step 12, where the stage of p = 2 has ended"""
    shutil.copytree(trained, out)
    os.remove(out / "ckpt_p1.pt")
    os.replace(out / "ckpt_p2.pt", out / "ckpt.pt")
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of weights as LlamaGen publishes them, and of a tokenizer"""
    folder = tmp_path_factory.mktemp("published")
    model = small_model(vocab=32, classes=5, dim=128)
    torch.save({"model": model.state_dict()}, folder / "c2i.pt")
    vq = tokenizer.VQModel(32, 8, 32, (1, 1, 1), 32)
    torch.save({"model": vq.state_dict()}, folder / "vq.pt")
    return folder


def sampling(published, **values):
    """The arguments that sample from the published weights"""
    return flags(sample=published / "c2i.pt", tokenizer=published / "vq.pt", **values)


# ---- 1. Next patch prediction --------------------------------------------------------------------

@pytest.mark.parametrize("p", (1, 2, 4))
def test_patchify_and_targets_equal_unfold(p):
    codes = torch.randint(99, (2, 64))
    x = torch.stack([codes, -codes], dim=-1).float()                    # (2, 64, D = 2)
    blocks = F.unfold(codes.float().view(2, 1, 8, 8), p, stride=p)      # (2, K, N/K)
    targets = npp.patch_targets(codes, p)
    assert torch.equal(targets, blocks.mT.long())
    average = blocks.mean(1)
    torch.testing.assert_close(npp.patchify(x, p), torch.stack([average, -average], dim=-1))


@pytest.mark.parametrize("lam, spans", [
    (0.5, [(2, 0, 50), (1, 50, 100)]),
    (0.8, [(2, 0, 80), (1, 80, 100)]),
    (0.5, [(4, 0, 25), (2, 25, 50), (1, 50, 100)]),
    (0.5, [(8, 0, 12), (4, 12, 25), (2, 25, 50), (1, 50, 100)]),
])
def test_stages_at_every_boundary(lam, spans):
    patches = [p for p, first, end in spans]
    assert npp.stages(100, patches, lam) == spans
    for p, first, end in spans:
        assert npp.stage(first, 100, patches, lam) == (p, first, end)
        assert npp.stage(end - 1, 100, patches, lam) == (p, first, end)


def test_learning_rate_at_every_boundary():
    def rate(step, warmup=5, patches=(2, 1), lr=1.0):
        return npp.lr_at(step, total=200, patches=patches, lam=0.5, lr=lr, lr_min=0.1,
                         warmup=warmup, decay_frac=0.2)

    # Each stage starts afresh.
    for first in (0, 100):
        warming = [rate(first + i) for i in range(6)]
        assert warming == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
        assert rate(first + 80) == pytest.approx(1.0)
        assert rate(first + 90) == pytest.approx(0.1 + 0.9 / 2)
        assert rate(first + 99) == pytest.approx(0.1 + 0.9 / 20)

    # A warm-up takes at most a tenth of its stage, which is 10 steps.
    assert rate(0, warmup=1000) == pytest.approx(0.1)
    assert rate(9, warmup=1000) == 1.0
    assert rate(100, patches=(1,)) == 1.0
    # With lr_min above lr, the decay does not rise.
    assert rate(99, lr=0.01) == 0.01


# ---- 2, 3. Rotary positions, and the transformer -------------------------------------------------

@pytest.mark.parametrize("p", (1, 2, 4))
def test_logits_loss_gradient_and_rope_of_the_official_code(golden, p):
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
    ("B", 110.888), ("L", 342.9), ("XL", 774.7), ("XXL", 1411.0), ("3B", 3096.7),
])
def test_published_sizes(tmp_path, name, millions):
    with torch.device("meta"):
        model = npp.Transformer(**npp.SIZES[name], vocab=16384, classes=1000, grid=16)
    count = sum(w.numel() for w in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)

    # A checkpoint does not say how many heads there are. In this one every place of a tensor shows
    # the same number, so the file stays small.
    state = {}
    for key, weight in model.state_dict().items():
        state[key] = torch.zeros(()).expand(weight.shape)
    torch.save(state, tmp_path / "weights.pt")
    assert npp.load_model(tmp_path / "weights.pt").n_head == npp.SIZES[name]["n_head"]


@pytest.mark.parametrize("p", (1, 2, 4))
def test_no_gradient_from_the_future(p):
    model = small_model(vocab=64, grid=8)
    codes = torch.randperm(64)[None]  # each code once: a row of the table stands for a position
    for i in range(64 // p**2):
        loss = model(codes, torch.tensor([1]), p)[0, i].logsumexp(0)
        gradient = torch.autograd.grad(loss, model.tok_embeddings.weight)[0]
        of_positions = gradient[codes].abs()                            # (1, 64, D)
        seen = npp.patchify(of_positions, p).sum(-1)[0] > 0
        assert seen[:i].all()
        assert not seen[i:].any()


def test_dropout_in_training_only_and_never_of_labels():
    codes = torch.randint(11, (32, 16))
    labels = torch.randint(3, (32,))
    model = small_model(dropout=0.5)
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))
    model = small_model().train()
    assert torch.equal(model(codes, labels), model(codes, labels))


# ---- 4. Sampling ---------------------------------------------------------------------------------

def test_choose_inverts_the_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    u = torch.tensor([[0.0, 0.49, 0.51, 1 - 2**-24]])
    assert npp.choose(logits, u).tolist() == [[0, 0, 1, 2]]


def test_top_k_and_top_p_keep_the_likeliest_codes():
    logits = torch.tensor([[0.05, 0.5, 0.05, 0.3, 0.1]]).log()
    u = torch.tensor([[0.0, 0.5, 1 - 2**-24]])

    def drawn(**options):
        return set(npp.choose(logits, u, **options)[0].tolist())

    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.4) == {1}  # the code that crosses top_p stays
    assert drawn(top_p=0.6) == {1, 3}
    assert drawn(temperature=0) == {1}


@torch.no_grad()
@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("unit", (1, 3))
def test_cached_logits_equal_uncached(p, unit):
    model = small_model()
    codes = torch.randint(11, (3, 16))
    labels = torch.tensor([0, 1, 3])
    x = model.embed_patches(codes, p)
    x = torch.cat([model.embed_class(labels), x[:, :-1]], dim=1)
    cached = npp.CachedModel(model, 3, p)
    cached.unit = unit  # above 1, as when compiled, it reads positions that are not yet filled
    logits = [cached(x[:, i : i + 1], i) for i in range(16 // p**2)]
    torch.testing.assert_close(torch.stack(logits, dim=1), model(codes, labels, p))


@pytest.mark.parametrize("scale", (1, 2))
def test_greedy_samples_of_the_official_code(golden, scale):
    official, model = golden
    codes = npp.generate(model, official["labels"], cfg_scale=scale, top_k=1)
    assert torch.equal(codes, official[f"greedy_cfg{scale}"].long())


def test_nan_logits_are_refused():
    model = small_model()
    model.output.weight.data[0, 0] = math.nan
    with pytest.raises(npp.BadInput, match="NaN"):
        npp.generate(model, torch.tensor([0, 1]))


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),  # half a minute, and a C++ compiler
    pytest.param("cuda", marks=gpu),
])
@pytest.mark.parametrize("p", (1, 2))
def test_compiled_sampling_draws_the_same_codes(device, p):
    torch._dynamo.reset()
    model = small_model(grid=8).to(device)
    labels = torch.tensor([0, 1, 2], device=device)
    cached = npp.CachedModel(model, 6, p)
    npp.compile_steps(cached)
    for _ in range(2):  # the second batch replays the graphs of the first
        noise = torch.rand(3, 64, device=device)
        plain = npp.generate(model, labels, 2.0, noise=noise, p=p)
        compiled = npp.generate(model, labels, 2.0, noise=noise, p=p, cached=cached)
        assert torch.equal(plain, compiled)


# ---- 5. Data -------------------------------------------------------------------------------------

def test_epoch_visits_every_image_once(data):
    images = npp.Codes(data)
    cfg = npp.Config(batch=36, class_dropout=0)
    order = np.stack([npp.epoch_order(96, 0, epoch) for epoch in range(3)])
    assert (np.sort(order) == np.arange(96)).all()
    assert not np.array_equal(order[0], order[1])
    labels = [npp.batch_at(images, step, cfg)[1] for step in range(8)]  # 8 * 36 = 3 * 96
    assert np.array_equal(torch.cat(labels), images.labels[order.flatten()])


def test_views_and_null_labels_are_random(data):
    images = npp.Codes(data)
    codes, labels = npp.batch_at(images, 0, npp.Config(batch=96, class_dropout=0.3))
    order = npp.epoch_order(96, 0, 0)
    null_labels = (labels == 3).numpy()
    first_view = (codes.numpy() == images.codes[order, 0]).all(1)
    assert 0.2 < null_labels.mean() < 0.4
    assert 0.5 < first_view.mean() < 0.8  # a third of the images have two equal views


# ---- 6. Training ---------------------------------------------------------------------------------

def test_one_image_is_learned_by_heart(tmp_path):
    data = write_data(tmp_path / "one", images=1, classes=1, views=1)
    out = tmp_path / "run"
    assert train(data, out, steps=160, batch=1, lr=1.2, class_dropout=0.0, eval_every=160) == 0
    assert log(out)[-1]["loss"] < 0.05
    model = npp.load_model(out / "ckpt.pt")
    drawn = npp.generate(model, torch.tensor([0]))
    assert drawn[0].tolist() == npp.Codes(data).codes[0, 0].tolist()


def test_fine_tuning_starts_from_given_weights(trained, tmp_path):
    tuned = tmp_path / "tuned"
    other_classes = write_data(tmp_path / "other", classes=5)
    arguments = training(other_classes, tuned, steps=2, lr=0.0, lr_min=0.0)
    assert npp.main(arguments + flags(init=trained / "ckpt.pt")) == 0
    table = "cls_embedding.embedding_table.weight"
    before = weights(trained)
    after = weights(tuned)
    assert len(before.pop(table)) == 4
    assert len(after.pop(table)) == 6  # the classes start anew
    assert same(before, after)
    refuses(npp.main, arguments, "init")  # a run from random weights is another one


COMMANDS_OF_RANKS = """
import json, os, sys, time, npp, tokenizer
import torch.distributed as dist

def tear_down():
    time.sleep(600)  # as NCCL's may wait for the other ranks

def main():
    *commands, last = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    for of_rank in commands:
        try:
            npp.main(of_rank[rank])
        except npp.BadInput as error:  # of both ranks
            tokenizer.complain(error)
    npp.main(last[rank])

dist.destroy_process_group = tear_down
tokenizer.run_program(main, "npp.py")
"""


def run_two_ranks(*commands):
    """Run commands, each a pair (of rank 0, of rank 1) -> stderr of both ranks

    In the last command rank 1 fails. Then it ends with one line, and rank 0 in under a minute.
    """
    messages = []
    ranks = start_two_ranks("-c", COMMANDS_OF_RANKS, json.dumps(commands))
    for process in ranks:
        _, message = process.communicate(timeout=60)
        messages.append(message)
    assert ranks[0].returncode > 0, messages[0]
    assert ranks[1].returncode == 2, messages[1]
    assert messages[1].count("npp.py: ") == 1
    return messages


@pytest.fixture(scope="module")
def two_ranks(published, trained, tmp_path_factory):
    """A folder of what two ranks make, and their messages as they fail at last"""
    folder = tmp_path_factory.mktemp("two_ranks")
    data = trained.parent / "data"
    train = training(data, folder / "run", micro_batch=2)
    sample = sampling(published, image_size=16, n=11, micro_batch=3, out=folder / "x.npz")
    resume = training(data, unfinished(trained, folder / "unfinished"))
    begin = training(data, folder / "new")

    damaged = write_data(folder / "damaged")
    codes = np.load(damaged / "codes.npy")
    codes[npp.epoch_order(96, 0, 0)[4:8]] = 255  # what rank 1 sees in the first batch
    np.save(damaged / "codes.npy", codes)
    fail = training(damaged, folder / "failing")
    messages = run_two_ranks((train, train), (sample, sample), (resume, begin), (fail, fail))
    return folder, messages


def test_two_ranks_and_micro_batches_train_as_one(trained, data, two_ranks, tmp_path):
    assert train(data, tmp_path / "micro", micro_batch=2) == 0
    for out in (tmp_path / "micro", two_ranks[0] / "run"):
        for one, other in zip(log(trained), log(out), strict=True):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        one = weights(trained, "ckpt_p2.pt")["tok_embeddings.weight"]
        other = weights(out, "ckpt_p2.pt")["tok_embeddings.weight"]
        assert relative(one, other) < 1e-2  # Adam divides tiny gradients by themselves


def test_rank_that_fails_or_differs_ends_the_run(two_ranks, published, tmp_path):
    _, messages = two_ranks
    for message, step in zip(messages, (12, 0)):
        assert f"ranks see different checkpoints, this one step {step}" in message
    assert "code 255, expected 0 to 15" in messages[1]
    arguments = sampling(published, image_size=16, n=4, out=tmp_path / "x.npz")
    _, message = run_two_ranks((arguments, arguments + flags(sample="missing.pt")))
    assert "missing.pt" in message
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.slow
def test_each_patch_edge_is_compiled_once_and_whole():
    torch._dynamo.reset()
    graphs = CompileCounter()
    model = small_model(grid=8).train()
    codes = torch.randint(11, (4, 64))
    labels = torch.randint(3, (4,))
    compiled = torch.compile(model, backend=graphs, dynamic=False, fullgraph=True)
    for p in (2, 2, 1, 1):
        compiled(codes, labels, p, loss=True).backward()
    assert graphs.frame_count == 2


@gpu
def test_gpu_step_waits_for_nothing():
    meta = {"vocab": 11, "grid": 8, "classes": ["a", "b", "c"]}
    model, optimizer = npp.build(npp.Config(), meta, torch.device("cuda"))
    codes = torch.randint(11, (4, 64), device="cuda")
    labels = torch.randint(3, (4,), device="cuda")
    npp.train_step(model, optimizer, codes, labels, p=2, pieces=2, dtype="bfloat16")
    torch.cuda.set_sync_debug_mode("error")
    try:
        npp.train_step(model, optimizer, codes, labels, p=2, pieces=2, dtype="bfloat16")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- 7. Logging, validation, checkpoints ---------------------------------------------------------

def test_run_leaves_a_log_and_checkpoints(trained):
    assert sorted(os.listdir(trained)) == ["ckpt.pt", "ckpt_p1.pt", "ckpt_p2.pt", "log.jsonl"]
    lines = log(trained)
    assert [x["step"] for x in lines] == [1, 4, 6, 8, 12, 16, 18, 20, 24]
    assert lines[4]["p"] == 2
    assert lines[5]["p"] == 1
    assert [x["step"] for x in lines if "val_loss" in x] == [6, 12, 18, 24]
    assert lines[0]["loss"] == pytest.approx(math.log(16), abs=1e-5)
    assert lines[-1]["loss"] < 2
    for line in lines:  # lr is per 256 images
        rate = npp.lr_at(line["step"] - 1, 24, (2, 1), 0.5, 0.03 * 8 / 256, 1e-5,
                         warmup=96 / 8, decay_frac=0.2)
        assert line["lr"] == rate
    assert same(weights(trained), weights(trained, "ckpt_p1.pt"))


KILLED_AFTER_A_LINE_OF_THE_LOG = """
import os, signal, sys, npp

step = int(sys.argv.pop(1))
record = npp.Recorder.record

def record_and_die(recorder, done, *others):
    record(recorder, done, *others)
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)

npp.Recorder.record = record_and_die
npp.main()
"""


def test_killed_run_equals_an_uninterrupted_one(data, tmp_path):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    # It is killed once in each stage, two steps after a checkpoint.
    for step in (8, 20):
        process = start("-c", KILLED_AFTER_A_LINE_OF_THE_LOG, step,
                        *training(data, broken, dropout=0.1))
        _, message = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, message
        assert log(broken)[-1]["step"] == step
        assert checkpoint(broken)["step"] == step - 2
    assert train(data, broken, dropout=0.1) == 0
    assert train(data, whole, dropout=0.1) == 0
    for name in ("ckpt_p2.pt", "ckpt_p1.pt", "ckpt.pt"):
        one = checkpoint(whole, name)
        other = checkpoint(broken, name)
        assert same(one["model"], other["model"])
        for moments, others in zip(one["optimizer"]["state"].values(),
                                   other["optimizer"]["state"].values(), strict=True):
            assert same(moments, others)
    assert log(whole) == log(broken)


def test_resume_needs_only_the_checkpoint_even_of_an_older_version(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    (out / "log.jsonl").write_bytes(b'{"step": 4, "p": 2}\n\0\0\0\n{"step": 1')
    saved = checkpoint(out)
    del saved["log"]
    del saved["config"]["clip"]  # its default counts
    torch.save(saved, out / "ckpt.pt")
    refuses(npp.main, training(data, out, clip=2), "clip 1.0, now 2.0")
    assert train(data, out) == 0
    assert log(out) == log(trained)[5:]
    assert same(weights(out), weights(trained))


def test_finished_run_is_left_alone(trained, data, tmp_path, capsys):
    out = tmp_path / "my run"
    shutil.copytree(trained, out)

    def times():
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    before = times()
    assert train(data, out, micro_batch=4, log_every=1) == 0
    init = f"--init '{out}/ckpt.pt'"  # the way on from a finished run, and from another recipe
    printed = capsys.readouterr().out
    assert "is finished" in printed
    assert init in printed
    refuses(npp.main, training(data, out, steps=48), "steps 24, now 48", init)
    refuses(npp.main, training(data, out, lam=0.25, seed=3), "lam 0.5, now 0.25", "seed 0, now 3")
    assert before == times()


TWICE_AS_ON_WINDOWS = """
import os, runpy, signal, sys

sys.modules["fcntl"] = None
del signal.SIGHUP
del os.fork
import fid, tokenizer
try:
    runpy.run_path("npp.py", run_name="__main__")
except SystemExit as error:
    assert error.code == 130
runpy.run_path("npp.py", run_name="__main__")
"""


def test_signals_save_and_exit_130(data, tmp_path):
    out = tmp_path / "run"
    process = start("-c", TWICE_AS_ON_WINDOWS, *training(data, out, steps=4000, eval_every=4000))

    def wait_for(words):
        while words not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()

    for number in (signal.SIGINT, signal.SIGTERM):
        wait_for("img/s")
        process.send_signal(number)
        wait_for("run the same command to resume")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    steps = [line["step"] for line in log(out)]
    assert steps == sorted(set(steps))
    assert checkpoint(out)["step"] == steps[-1]


def test_nan_loss_stops_and_keeps_the_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    refuses(npp.main, training(data, out, lr=2e9, clip=2e9, eval_every=100), "the loss is nan")
    assert checkpoint(out)["step"] == 0
    for weight in weights(out).values():
        assert weight.isfinite().all()


def test_full_disk_keeps_the_old_checkpoint(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    before = weights(out)
    with full_disk():
        refuses(npp.main, training(data, out), "ckpt.pt: cannot be written (File too large)")
    assert same(before, weights(out))
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.jsonl"]


def test_checkpoint_is_saved_before_a_picture_that_fails(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    steps = []

    def sample(*arguments):
        steps.append(checkpoint(out)["step"])
        raise RuntimeError("out of memory")

    monkeypatch.setattr(npp, "sample", sample)
    assert train(data, out, steps=4) == 0
    assert steps == [2, 4]
    printed = capsys.readouterr().out
    assert f"{out}/samples_p2.png: not drawn (out of memory)" in printed
    assert f"{out}/samples.png: not drawn (out of memory)" in printed


# ---- 8. Samples from a checkpoint ----------------------------------------------------------------

@pytest.mark.parametrize("layout, prefix", [
    ("", ""), ("model", ""), ("module", ""),  # published ones
    ("state_dict", "model."), ("model", "_orig_mod."), ("", "module."),  # what wrappers add
])
def test_published_layouts(tmp_path, layout, prefix):
    state = small_model(dim=128).state_dict()
    saved = {prefix + name: weight for name, weight in state.items()}
    if layout:
        # The training checkpoints of LlamaGen carry their flags.
        saved = {layout: saved, "args": argparse.Namespace(gpt_model="GPT-B")}
    torch.save(saved, tmp_path / "weights.pt")
    loaded = npp.load_model(tmp_path / "weights.pt", grid=6)
    assert loaded.n_head == 2
    assert not loaded.training
    assert same(loaded.state_dict(), state)


def test_published_weights_sample_at_any_size(published, tmp_path):
    arguments = sampling(published, data="none", image_size=24, n=5, classes="4,2")
    assert npp.main(arguments + flags(out=tmp_path / "a.npz")) == 0
    assert npp.main(arguments + flags(out=tmp_path / "b.npz", image_size_eval=16)) == 0
    at_24 = np.load(tmp_path / "a.npz")
    at_16 = np.load(tmp_path / "b.npz")
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


def test_balanced_and_random_classes(published, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # means nothing without WORLD_SIZE

    def labels(**values):
        out = tmp_path / "x.npz"
        assert npp.main(sampling(published, image_size=4, out=out, **values)) == 0
        return np.load(out)["labels"].tolist()

    assert labels(n=7) == [0, 1, 2, 3, 4, 0, 1]
    random = labels(n=10, classes="random")
    assert random == labels(n=20, classes="random")[:10]
    assert random != labels(n=10, classes="random", seed=1)


def test_two_ranks_draw_the_samples_of_one(published, two_ranks, tmp_path):
    one = tmp_path / "x.npz"
    assert npp.main(sampling(published, image_size=16, n=11, out=one)) == 0
    assert one.read_bytes() == (two_ranks[0] / "x.npz").read_bytes()


def test_own_images_become_codes_pictures_and_samples(own, published, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(own / "data", out, steps=4) == 0
    assert "samples.png: cats, dogs" in capsys.readouterr().out
    for name in ("samples.png", "samples_p2.png"):
        # Ten of each class: 16 pixels and a line between two images, all four times as large
        assert Image.open(out / name).size == (676, 132)

    # A kill may come between a checkpoint and its picture.
    picture = (out / "samples_p2.png").read_bytes()
    os.remove(out / "samples_p2.png")
    assert train(own / "data", out, steps=4) == 0
    assert (out / "samples_p2.png").read_bytes() == picture

    sample = flags(sample=out / "ckpt.pt")
    assert npp.main(sample + flags(n=5, out=tmp_path / "a.npz")) == 0
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (5, 16, 16, 3)
    assert npp.main(sample + flags(n=6, classes="dogs,0", out=tmp_path / "dogs.png")) == 0
    assert Image.open(tmp_path / "dogs.png").size == (200, 132)
    other = published / "vq.pt"
    refuses(npp.main, sample + flags(tokenizer=other), other, "another tokenizer")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_pictures_of_training_equal_samples(own, tmp_path, dtype):
    out = tmp_path / "run"
    assert train(own / "data", out, lr=0.3, dtype=dtype) == 0
    arguments = flags(sample=out / "ckpt.pt", out=tmp_path / "again.png", dtype=dtype)
    assert npp.main(arguments) == 0
    assert (tmp_path / "again.png").read_bytes() == (out / "samples.png").read_bytes()


# ---- 9. The command line and the README ----------------------------------------------------------

def test_tiny_has_its_own_recipe_and_others_the_papers(capsys):
    tiny = npp.parse([])
    assert tiny.steps == 1200
    assert tiny.dropout == 0
    paper = npp.parse(["--model", "B"])
    assert paper.steps == 0
    assert paper.epochs == 300
    assert paper.dropout == 0.1
    assert npp.parse(["--epochs", "0.5"]).steps == 0
    with pytest.raises(SystemExit):
        npp.main(["--help"])
    printed = capsys.readouterr().out
    assert inspect.getsource(npp.Config) in printed
    assert str(npp.TINY) in printed


@pytest.mark.parametrize("native, dtype, compile", [
    (False, "float32", "false"),  # a CPU; and a T4, of free Colab and Kaggle, emulates bfloat16
    (True, "bfloat16", "true"),
])
def test_dtype_and_compile_follow_from_the_gpu(monkeypatch, native, dtype, compile):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    cfg = npp.parse([])
    assert cfg.dtype == dtype
    assert cfg.compile == compile
    assert npp.parse(["--dtype", "bfloat16"]).dtype == "bfloat16"


def test_readme_quotes_the_code_and_links_to_files():
    readme = (HERE / "README.md").read_text()
    code = (HERE / "npp.py").read_text()
    for quote in re.findall(r"```python\n(.*?)```", readme, re.S):
        assert quote in code
    for path in re.findall(r"\]\((?!http|#)(.*?)[#)]", readme):
        assert (HERE / path).exists(), path


# ---- Bad input: one line that names it -----------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    ("--stepz 3", ["stepz"]),
    ("--lr nan", ["lr is nan"]),
    ("--patches 1,2", ["patches is (1, 2)"]),
    ("--patches 3,1", ["patches is (3, 1)", "divisors of 4"]),
    ("--patches 4,2,1 --steps 2", ["steps is 2", "left for p = 4"]),
    ("--micro_batch 3", ["batch is 8", "a multiple of 3"]),
    ("--data none", ["none/meta.json"]),
])
def test_bad_flag_of_training_is_named(data, tmp_path, changes, words):
    out = tmp_path / "run"
    refuses(npp.main, training(data, out) + shlex.split(changes), *words)
    assert not out.exists()


def test_changed_stages_must_end_with_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(npp, "stages", lambda total, patches, lam: [(2, 0, 9), (1, 9, total - 2)])
    refuses(npp.main, training(data, tmp_path / "run"), "ends at step 22, expected 24")


@pytest.mark.parametrize("name, array, words", [
    ("codes.npy", np.full((96, 2, 16), 16, np.uint8), ["code 16", "0 to 15"]),
    ("labels.npy", np.full(96, 3), ["3 to 3", "0 to 2"]),
    ("labels.npy", np.arange(96) % 2, ["class 2"]),  # a class without images
])
def test_bad_array_of_the_data_is_named(data, tmp_path, name, array, words):
    np.save(data / name, array)
    refuses(npp.main, training(data, tmp_path / "run"), data, *words)


@pytest.mark.parametrize("changes, words", [
    ("--out samples.jpg", ["samples.jpg", "a .png or an .npz"]),
    ("--out folder.npz", ["folder.npz", "is a folder"]),
    ("--classes 5", ["classes is 5", "0 to 4"]),
    ("--tokenizer ''", ["--tokenizer"]),
    ("--image_size 25", ["image_size is 25", "expected a multiple of 4"]),
    ("--sample vq.pt", ["vq.pt", "expected a transformer"]),
    ("--sample weights.safetensors", ["weights.safetensors", "in a .pt file"]),
])
def test_bad_flag_of_sampling_is_named(published, tmp_path, monkeypatch, changes, words):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.npz")
    (tmp_path / "weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    arguments = flags(sample="c2i.pt", tokenizer="vq.pt", image_size=24, out="x.npz")
    refuses(npp.main, arguments + shlex.split(changes), *words)
    assert not os.path.exists("x.npz")


def test_bad_checkpoint_is_refused_and_runs_no_code(trained, data, tmp_path):
    out = unfinished(trained, tmp_path / "run")
    path = out / "ckpt.pt"
    whole = path.read_bytes()
    marker = tmp_path / "code has run"
    with_code = write_pickle_with_code(tmp_path / "code.pt", marker).read_bytes()
    for content in (with_code, whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        refuses(npp.main, training(data, out), path, "expected a checkpoint of npp.py")
        refuses(npp.main, training(data, tmp_path / "new", init=path), path)
        refuses(npp.main, flags(sample=path), path, "expected a transformer")
        assert path.read_bytes() == content  # what could be rescued by hand is not lost
    assert not marker.exists()
