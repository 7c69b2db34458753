"""What Next Patch Prediction costs: counted, and measured on this machine

$ python notebooks/bench.py plan --model XXL --patches 8,4,2,1    # counts, trains nothing
$ python notebooks/bench.py                                       # about a minute on a CPU
$ python notebooks/bench.py --size B --batch 128 --peer CLONE     # a GPU, beside the official code

CLONE is a checkout of PKU-YuanGroup/Next-Patch-Prediction: its model with our weights, in our
training step, and its generate. Samples have guidance 2. A recent GPU computes in bfloat16, eager
and compiled. Each round calls everything once. The table shows medians over the rounds (smallest to
largest), and ratios of times taken within a round. "(2,1)" is the mean step of that schedule.

The share of the rate of a large matrix product is the model FLOP utilisation. It counts the linear
layers and the output head, but no attention scores. Memory limits sampling, which reads all weights
for each position.
"""

import copy
import inspect
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import npp  # noqa: E402
from tokenizer import parse_flags, require, run_program, setup  # noqa: E402

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


@dataclass
class Plan(npp.Config):
    # The flags of npp.py, and
    model: Literal[tuple(npp.SIZES)] = "B"
    images: int = 1_281_167      # images to train on
    vocab: int = 16384           # codes in the vocabulary
    grid: int = 16               # codes per side of an image
    tflops: float = 400.0        # TFLOP/s that the GPU reaches


def plan(cfg):
    """Print what each stage of a schedule costs, and the total beside next-token prediction"""
    data = SimpleNamespace(codes=range(cfg.images), meta={"grid": cfg.grid})
    npp.check(cfg, data, world_size=1)                      # fills in cfg.steps
    average, of_stages = cost(cfg.model, cfg.patches, cfg.lam, cfg.vocab, cfg.grid)
    next_token, _ = cost(cfg.model, (1,), cfg.lam, cfg.vocab, cfg.grid)
    print("  p       steps  positions  G multiply-adds per image  share")
    for (p, first, end), x in zip(npp.stages(cfg.steps, cfg.patches, cfg.lam), of_stages):
        positions = cfg.grid**2 // p**2 + 1
        share = (end - first) / cfg.steps * x / average
        print(f"{p:3} {end - first:11,} {positions:10,} {x / 1e9:25.2f} {share:7.1%}")
    print(f"average {average / 1e9:.2f}, {average / next_token:.4f} of the {next_token / 1e9:.2f} "
          "of plain next-token prediction")
    flop = 6 * average * cfg.steps * cfg.batch              # 2 x (1 forward + 2 backward)
    print(f"training, forward and backward: {flop / cfg.tflops / 1e12 / 3600:,.1f} hours on a GPU "
          f"that reaches {cfg.tflops:g} TFLOP/s")


# ---- 2. Measured ---------------------------------------------------------------------------------

@dataclass
class Bench:
    size: Literal[tuple(npp.SIZES)] = "tiny"
    batch: int = 16              # images at once
    rounds: int = 5              # how often each call is timed
    compile: Literal["auto", "true", "false"] = "auto"      # beside eager; auto: on a recent GPU
    peer: str = ""               # checkout of the official code
    vocab: int = 0               # codes in the vocabulary; 0: 256 for tiny, else 16384
    grid: int = 0                # codes per side, a multiple of 4; 0: 8 for tiny, else 16


def measure(args):
    """Print the table of this machine"""
    tiny = args.size == "tiny"
    if args.vocab == 0:
        args.vocab = 256 if tiny else 16384
    if args.grid == 0:
        args.grid = 8 if tiny else 16
    _, _, device = setup()
    # npp.py decides on compile and dtype. The official dropout is 0.1 at every size.
    cfg = npp.parse(["--model", args.size, "--compile", args.compile, "--dropout", "0.1"])
    dtype = getattr(torch, cfg.dtype)
    modes = ["eager"]
    if cfg.compile == "true":
        modes.append("compiled")
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {cfg.dtype}, "
          f"{args}", flush=True)

    codes = torch.randint(args.vocab, (args.batch, args.grid**2), device=device)
    labels = torch.arange(args.batch, device=device) % 1000
    meta = {"vocab": args.vocab, "grid": args.grid, "classes": range(1000)}
    model, optimizer = npp.build(cfg, meta, device)
    nn.init.normal_(model.output.weight, std=0.02)          # a GPU multiplies zeros faster
    contestants = [("ours", model, optimizer, our_sampler)]
    if args.peer:
        official = Official(args, model)
        optimizer = torch.optim.AdamW(official.parameters(), fused=True)
        contestants.append(("official", official, optimizer, official_sampler))

    side = 8192 if gpu else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    calls = {"matmul": partial(torch.mm, matrix, matrix)}
    for who, network, optimizer, sampler in contestants:
        frozen = copy.deepcopy(network).to(dtype).eval()    # samples while the other one trains
        for mode in modes:
            trained = network
            if mode == "compiled":
                trained = torch.compile(network, dynamic=False)
            for p in (1, 2, 4):
                calls[f"train p={p}", mode, who] = partial(
                    npp.train_step, trained, optimizer, codes, labels, p, dtype=cfg.dtype)
            calls["sample", mode, who] = sampler(frozen, labels, mode)
    seconds = time_interleaved(calls, args.rounds, getattr(torch, device.type).synchronize)

    peak = 2 * side**3 / np.median(seconds.pop("matmul"))
    print(f"matmul of {side} x {side}: {peak / 1e12:.4g} TFLOP/s")
    for (what, mode, who), times in list(seconds.items()):
        if what == "train p=2":  # a (2,1) run takes as many steps at p = 1
            mean = (times + seconds["train p=1", mode, who]) / 2
            seconds["train (2,1)", mode, who] = mean
    show(args, seconds, peak)


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

    def __init__(self, args, ours):
        super().__init__()
        require(os.path.isdir(f"{args.peer}/autoregressive"),
                f"peer is {args.peer}, expected a checkout of the official repository")
        sys.path.append(args.peer)      # last, as it has a package `tokenizer` too
        from autoregressive.models import generate, gpt
        gpt.target_patchify = same_targets
        device = ours.output.weight.device
        shape = gpt.ModelArgs(**npp.SIZES[args.size], vocab_size=args.vocab,
                              block_size=args.grid**2)
        self.model = gpt.Transformer(shape).to(device)
        self.model.load_state_dict(ours.state_dict())
        self.generate = generate.generate
        self.rope = {}
        for p in (1, 2, 4):
            rope = gpt.precompute_freqs_cis_2d(args.grid // p, ours.head_dim, cls_token_num=1)
            self.rope[p] = rope.to(device)

    def forward(self, codes, labels, p, loss=True):
        _, loss = self.model(codes, labels, targets=codes, p=p, patch_size=p * p,
                             freqs_cis=self.rope[p])
        return loss


def same_targets(codes, p, patch_size):
    """Theirs is F.unfold of integers, which eager code does not have"""
    return npp.patch_targets(codes, p)


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


def show(args, seconds, peak):
    codes = args.grid**2
    at_1, _ = cost(args.size, (1,), vocab=args.vocab, grid=args.grid)
    weights = at_1 / (codes + 1)
    # Positions of an image, times 3 for forward and backward, times 2 for guidance
    positions = {"train p=1": 3 * codes, "train p=2": 3 * codes / 4, "train p=4": 3 * codes / 16,
                 "train (2,1)": 3 * codes * 5 / 8, "sample": 2 * codes}
    for (what, mode, who), times in seconds.items():
        speed = args.batch / np.median(times)
        share = 2 * weights * positions[what] * speed / peak
        line = (f"{what:12}{mode:9}{who:9}{spread(1000 * times)} ms {speed:8.4g} images/s "
                f"{share:6.1%} of matmul")
        if what.startswith("train"):
            ratio = times / seconds["train p=1", mode, who]
            line += f"{spread(ratio)} of p=1"
        if who == "official":
            ratio = times / seconds[what, mode, "ours"]
            line += f"{spread(ratio)} of ours"
        print(line)


def spread(values):
    return f"{np.median(values):8.4g} ({values.min():.4g} to {values.max():.4g})"


# ---- 3. Command line -----------------------------------------------------------------------------

def parse(flags, argv):
    text = f"{__doc__}\n{inspect.getsource(flags)}"
    return flags(**parse_flags("bench.py", text, flags, argv))


def main(argv=None):
    """-> exit code 0. Raises BadInput."""
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["plan"]:
        plan(parse(Plan, argv[1:]))
    else:
        measure(parse(Bench, argv))
    return 0


if __name__ == "__main__":
    run_program(main, "bench.py")
