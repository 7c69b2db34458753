"""What Next Patch Prediction costs: counted, and measured on this machine

$ python notebooks/bench.py plan --model XXL --patches 8,4,2,1
$ python notebooks/bench.py                                               # a minute on a CPU
$ python notebooks/bench.py --model B --vocab 16384 --grid 16 --batch 128                 # a GPU

Without a command it measures; `measure --help` lists the flags.
"""

import copy
import os
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import npp  # noqa: E402
from tokenizer import run_command, run_program, setup  # noqa: E402

Size = Literal[tuple(npp.SIZES)]

# ---- 1. Counted ----------------------------------------------------------------------------------

def cost(size, patches=(2, 1), lam=0.5, vocab=16384, grid=16):
    """-> (average over the schedule, [one per stage]): forward multiply-adds per image

    These are the paper's "GFLOPs" (Table 2): linear layers and output head at N/K + 1 positions,
    without attention scores. size is a name such as "B", or a dict of n_layer, n_head and dim.
    """
    if isinstance(size, str):
        size = npp.SIZES[size]
    dim = size["dim"]
    layer = 4 * dim**2 + 3 * dim * npp.ffn_width(dim)
    weights = size["n_layer"] * layer + dim * vocab

    of_stages = []
    average = 0.0
    steps = 10**12                                          # so many that rounding does not show
    for p, first, end in npp.stages(steps, patches, lam):
        of_stage = weights * (grid**2 // p**2 + 1)
        average += (end - first) / steps * of_stage
        of_stages.append(of_stage)
    return average, of_stages


def plan(model: Size = "B", patches: tuple = (2, 1), lam: float = 0.5, epochs: float = 300.0,
         batch: int = 256, images: int = 1_281_167, vocab: int = 16384, grid: int = 16,
         tflops: float = 400.0):
    """What each stage of a schedule costs, and the total beside next-token prediction

    images: to train on. vocab: codes in the vocabulary. grid: codes per side of an image. tflops:
    TFLOP/s that the GPU reaches. The others are npp.py's.
    """
    cfg = npp.Config(patches=patches, lam=lam, epochs=epochs, batch=batch)
    data = SimpleNamespace(codes=range(images), meta={"grid": grid})
    npp.check(cfg, data, world_size=1)                      # fills in cfg.steps
    average, of_stages = cost(model, patches, lam, vocab, grid)
    next_token, _ = cost(model, (1,), lam, vocab, grid)
    print("  p       steps  positions  G multiply-adds per image  share")
    for (p, first, end), x in zip(npp.stages(cfg.steps, patches, lam), of_stages):
        share = (end - first) / cfg.steps * x / average
        print(f"{p:3} {end - first:11,} {grid**2 // p**2 + 1:10,} {x / 1e9:25.2f} {share:7.1%}")
    print(f"average {average / 1e9:.2f}, {average / next_token:.4f} of the {next_token / 1e9:.2f} "
          "of plain next-token prediction")
    flop = 6 * average * cfg.steps * batch                  # 2 x (1 forward + 2 backward)
    print(f"training, forward and backward: {flop / tflops / 1e12 / 3600:,.1f} hours on a GPU "
          f"that reaches {tflops:g} TFLOP/s")


# ---- 2. Measured ---------------------------------------------------------------------------------

def measure(model: Size = "tiny", vocab: int = 256, grid: int = 8, batch: int = 64, rounds: int = 5,
            compile: Literal["auto", "true", "false"] = "auto", peer: str = ""):
    """Time training steps and sampling (guidance 2) of `batch` images, on this machine

    vocab: codes in the vocabulary. grid: codes per side of an image, a multiple of 4. compile:
    compiled beside eager; auto: on a recent GPU, which computes in bfloat16. peer: a checkout of
    PKU-YuanGroup/Next-Patch-Prediction: its model with our weights, in our training step, and its
    generate.

    Each round calls everything once. The table shows medians over the rounds (smallest to largest),
    and ratios of times taken within a round. The share of the rate of a large matrix product is the
    model FLOP utilisation. It counts linear layers and output head, but no attention scores. Memory
    limits sampling, which reads all weights for each position.
    """
    _, _, device = setup()
    # npp.py decides on compile and dtype. The official dropout is 0.1 at every size.
    cfg = npp.parse(["--model", model, "--compile", compile, "--dropout", "0.1"])
    dtype = getattr(torch, cfg.dtype)
    modes = ["eager", "compiled"] if cfg.compile == "true" else ["eager"]
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {cfg.dtype}; "
          f"{model}, {batch} images of {grid} x {grid} codes out of {vocab}", flush=True)

    codes = torch.randint(vocab, (batch, grid**2), device=device)
    labels = torch.arange(batch, device=device) % 1000
    ours, optimizer = npp.build(cfg, dict(vocab=vocab, grid=grid, classes=range(1000)), device)
    nn.init.normal_(ours.output.weight, std=0.02)           # a GPU multiplies zeros faster
    contestants = [("ours", ours, optimizer, our_sampler)]
    if peer:
        official = Official(peer, ours)
        optimizer = torch.optim.AdamW(official.parameters(), fused=True)
        contestants.append(("official", official, optimizer, official_sampler))

    side = 8192 if gpu else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    calls = {"matmul": partial(torch.mm, matrix, matrix)}
    for who, network, optimizer, sampler in contestants:
        frozen = copy.deepcopy(network).to(dtype).eval()    # samples while the other one trains
        for mode in modes:
            trained = torch.compile(network, dynamic=False) if mode == "compiled" else network
            for p in (1, 2, 4):
                calls[f"train p={p}", mode, who] = partial(
                    npp.train_step, trained, optimizer, codes, labels, p, dtype=cfg.dtype)
            calls["sample", mode, who] = sampler(frozen, labels, mode)
    seconds = time_interleaved(calls, rounds, getattr(torch, device.type).synchronize)

    peak = 2 * side**3 / np.median(seconds.pop("matmul"))
    print(f"matmul of {side} x {side}: {peak / 1e12:.4g} TFLOP/s")
    weights = cost(model, (1,), vocab=vocab, grid=grid)[0] / (grid**2 + 1)
    show(seconds, batch, 2 * weights * grid**2 / peak)


def our_sampler(model, labels, mode):
    cached = npp.CachedModel(model, 2 * len(labels))
    if mode == "compiled":
        npp.compile_steps(cached)
    return partial(npp.generate, model, labels, cfg_scale=2.0, cached=cached)


def official_sampler(official, labels, mode):
    model = official.model
    if mode == "compiled":                                  # as the official script does it
        model = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    return partial(official.generate, model, labels, model.block_size, cfg_scale=2.0)


class Official(nn.Module):
    """The official model with the weights of ours; npp.train_step calls it as it calls ours"""

    def __init__(self, peer, ours):
        super().__init__()
        sys.path.append(peer)           # last, as it has a package `tokenizer` too
        from autoregressive.models import generate, gpt
        # Theirs is F.unfold of integers, which eager code does not have.
        gpt.target_patchify = lambda codes, p, patch_size: npp.patch_targets(codes, p)
        vocab, dim = ours.output.weight.shape
        self.model = gpt.Transformer(gpt.ModelArgs(
            n_layer=len(ours.layers), n_head=ours.n_head, dim=dim, vocab_size=vocab,
            block_size=ours.grid**2))
        self.model.load_state_dict(ours.state_dict())
        self.model.to(ours.output.weight.device)
        self.generate = generate.generate
        self.rope = {}
        for p in (1, 2, 4):
            rope = gpt.precompute_freqs_cis_2d(ours.grid // p, ours.head_dim, cls_token_num=1)
            self.rope[p] = rope.to(ours.output.weight.device)

    def forward(self, codes, labels, p, loss=True):
        _, loss = self.model(codes, labels, targets=codes, p=p, patch_size=p * p,
                             freqs_cis=self.rope[p])
        return loss


def time_interleaved(calls, rounds, synchronize):
    """-> {name: seconds of each round}, after two rounds that compile and record CUDA graphs"""
    seconds = {name: [] for name in calls}
    for i in range(2 + rounds):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def show(seconds, batch, unit):
    """unit: seconds that a matmul's rate needs for a forward pass of one image at p = 1"""
    # Forward and backward cost three passes, guidance costs two.
    passes = {"train p=1": 3, "train p=2": 3 / 4, "train p=4": 3 / 16, "sample": 2}
    for (what, mode, who), times in seconds.items():
        speed = batch / np.median(times)
        line = (f"{what:12}{mode:9}{who:9}{spread(1000 * times)} ms {speed:8.4g} images/s "
                f"{passes[what] * unit * speed:6.1%} of matmul")
        if what.startswith("train"):
            line += f"{spread(times / seconds['train p=1', mode, who])} of p=1"
        if who == "official":
            line += f"{spread(times / seconds[what, mode, 'ours'])} of ours"
        print(line)


def spread(values):
    return f"{np.median(values):8.4g} ({values.min():.4g} to {values.max():.4g})"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] not in (["plan"], ["measure"], ["--help"]):
        argv = ["measure", *argv]
    return run_command("bench.py", __doc__, (plan, measure), argv)


if __name__ == "__main__":
    run_program(main, "bench.py")
