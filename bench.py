"""What this code costs on the machine at hand, as one table

    python bench.py                          # size tiny: minutes on a CPU
    python bench.py --size B --batch 128 --what train,sample --json --peer CLONE      # for a GPU

    train    a step at p = 1, 2, 4; as a ratio also the mean step of (2,1), by npp.spans' shares
    sample   npp.generate by batch, without and with guidance
    data     npp.batch_at on ImageNet's shape, beside LlamaGen's small files; none from disk
    frechet  the distance of two full-rank Gaussians in 2048 dimensions, beside scipy

A GPU runs bfloat16 (training: autocast), eager and compiled; a CPU float32. --peer, a checkout of
PKU-YuanGroup/Next-Patch-Prediction, adds its model with our weights: in our training step (eager,
its F.unfold of int64 codes fails and goes through float64 here), and its generate. Times: median
(smallest to largest) over rounds of interleaved calls (a, b, a, b), after a warm-up; ratios within
each round. "matmul" and "read" are what the machine gives; "of" them, the larger share that a row
uses (of matmul in training: model-FLOP utilisation), counting
    TFLOP  2 for each weight of linear layers and head at each of the N/K positions, three times
           that in a training step; without attention scores, as in npp.cost
    GB     those weights and the filled KV cache, read for each of N positions drawn
GiB: what a call allocates on the GPU beyond what it finds (weights, optimizer, CUDA graphs).
"""
import itertools
import json
import mmap
import os
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from statistics import median

import numpy as np
import scipy
import torch
import torch.nn as nn

import fid
import npp
from common import BadInput, Machine, Parser, brief, generator, one_line_errors

# A call to time: the images it makes or takes, the codes it draws, what it must do and read
Row = namedtuple("Row", "call images codes flop bytes", defaults=(0, 0, 0, 0))
COLUMNS = {"images/s": 1, "codes/s": 1, "TFLOP/s": 1e12, "GB/s": 1e9}

def interleaved(calls, rounds, machine):
    """{name: call} -> {name: seconds of each round}, {name: GiB}, without what a GPU cannot hold"""
    calls, seconds, peak = dict(calls), {name: [] for name in calls}, {}
    warm_up = 2 if machine.gpu else 1  # compiling, then recording CUDA graphs
    for i in range(rounds + warm_up):
        for name, call in list(calls.items()):
            if machine.gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                call()
                if machine.gpu:
                    torch.cuda.synchronize()
                    peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
                if i >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                del calls[name], seconds[name]
    return seconds, peak

def measure(section, args, machine):
    """Show the rows of a section, then ratios: (name, {row: share} over, {row: share}, theory)"""
    rows, ratios = section(args, machine)
    rows = rate_rows(args, machine) | rows
    seconds, peak = interleaved({k: row.call for k, row in rows.items()}, args.rounds, machine)
    rates = {name: {column: x / unit / median(times) for x, (column, unit)
                    in zip(rows[name][1:], COLUMNS.items())} for name, times in seconds.items()}
    for name, times in seconds.items():
        share, of = max((rates[name][column] / rates[best][column], best)
                        for best, column in (("matmul", "TFLOP/s"), ("read", "GB/s")))
        show(args, row=name, median=median(times), rounds=times, **rates[name],
             GiB=peak.get(name), share=share, of=of)
    for name in rows.keys() - seconds.keys():
        show(args, note=f"{name}: left out, it does not fit the GPU's memory")
    for name, over, under, theory in ratios:
        if over.keys() | under.keys() <= seconds.keys():
            a, b = (sum(share * np.array(seconds[k]) for k, share in mix.items())
                    for mix in (over, under))
            show(args, ratio=name, median=median(a / b), rounds=list(a / b), theory=theory)

def show(args, **facts):
    """Print a line of JSON, or of the table"""
    line = json.dumps(facts) if args.json else facts.get("note")
    if not line:
        low, high, unit = min(facts["rounds"]), max(facts["rounds"]), " s"["row" in facts]
        line = f"{facts.get('row') or facts['ratio']:42}{facts['median']:9.4f} {unit} "
        line += f"{f'({low:.4g} to {high:.4g})':22}"
        line += "".join(f"{facts[k]:10,.4g} {k}" for k in (*COLUMNS, "GiB") if facts.get(k))
        line += f"{facts['share']:7.1%} of {facts['of']}" if facts.get("share") else ""
        line += f"{facts['theory']:9.4f} in theory" if facts.get("theory") else ""
    print(line.rstrip(), flush=True)

def rate_rows(args, machine):
    """What the machine gives: a large matmul in the dtype of the rest, and a large sum"""
    side, size = (8192, 2**28) if machine.gpu else (1024, 2**26)
    a = torch.randn(side, side, device=machine.device, dtype=args.dtype)
    x = torch.ones(size, device=machine.device)
    return {"matmul": Row(lambda: [torch.mm(a, a) for _ in range(4)], flop=8 * side**3),
            "read": Row(lambda: [x.sum() for _ in range(4)], bytes=16 * size)}

def build(args, machine):
    """-> Config, model, optimizer as npp.py trains them; how many weights each position meets"""
    cfg, shape = npp.Config(model=args.size), {"vocab": args.vocab, "grid": args.grid}
    model, optimizer = npp.build(cfg, {**shape, "classes": range(1000)}, machine.device)
    nn.init.normal_(model.output.weight, std=0.02)  # with zeros any two models would agree
    return cfg, model, optimizer, npp.cost(args.size, (1,), **shape)[0] / (args.grid**2 + 1)

def train_rows(args, machine):
    cfg, model, optimizer, weights = build(args, machine)
    batch = torch.randint(args.vocab, (args.batch, args.grid**2)), torch.arange(args.batch) % 1000
    sides, rows, ratios = {"ours": (model, optimizer)}, {}, []
    if args.peer:
        official = Official(args, model)
        sides["official"] = official, torch.optim.AdamW(official.parameters(), cfg.lr, fused=True)
    name, plans = "train {} {} p={}".format, {f"p={p}": {p: 1} for p in (1, 2, 4)}
    plans["(2,1)"] = {p: (end - first) / 1000 for p, first, end in npp.spans(1000, (2, 1), 0.5)}
    for how, (side, (net, optimizer)) in itertools.product(args.how, sides.items()):
        wrapped = torch.compile(net, dynamic=False) if how == "compiled" else net
        for p in (1, 2, 4):
            step = partial(npp.train_step, wrapped, optimizer, batch, p, cfg, machine)
            rows[name(side, how, p)] = Row(step, args.batch,
                                           flop=6 * weights * args.batch * args.grid**2 / p**2)
        for plan, shares in plans.items():
            mix, ours = ({name(s, how, p): x for p, x in shares.items()} for s in (side, "ours"))
            if plan != "p=1":
                ratios.append((f"train {side} {how} {plan} / p=1", mix, {name(side, how, 1): 1},
                               sum(x / p**2 for p, x in shares.items())))
            if side != "ours":
                ratios.append((f"train {how} {plan} official / ours", mix, ours, None))
    return rows, ratios

def sample_rows(args, machine):
    _, model, _, weights = build(args, machine)
    model, length, best = model.to(args.dtype).eval(), args.grid**2, f"ours {args.how[-1]}"
    draws = {f"ours {x}": partial(npp.generate, model, compile=x == "compiled") for x in args.how}
    if args.peer:
        official = Official(args, model).eval()
        fast = torch.compile(official.model, mode="reduce-overhead", fullgraph=True)  # as in theirs
        draws |= {f"official {how}": partial(official.generate, net, max_new_tokens=length)
                  for how, net in zip(args.how, (official.model, fast))}
    cases = [(best, n, scale) for n in sorted({max(1, args.batch // k) for k in (16, 4, 1)})
             for scale in (1, 2)] + [(who, args.batch, 2) for who in draws if who != best]
    rows, name = {}, "sample {} guidance {} {}".format
    for who, n, scale in cases:  # guidance 2: as many sequences an image
        labels = torch.arange(n, device=machine.device) % 1000
        cache = len(model.layers) * model.output.in_features * length * (length + 1) * n * scale
        rows[name(n, scale, who)] = Row(partial(draws[who], labels, cfg_scale=float(scale)), n,
                                        n * length, 2 * weights * length * n * scale,
                                        (weights * length + cache) * args.dtype.itemsize)
    base = name(args.batch, 2, best)
    return rows, [(f"{x} / 2 {best}", {x: 1}, {base: 1}, None) for x in rows
                  if x.startswith(f"sample {args.batch} ") and x != base]

def data_rows(args, machine):
    data, cfg, steps = npp.Codes("none"), npp.Config(batch=args.batch), itertools.count()
    n, files, views, length = data.facts["images"], 4096, 10, data.facts["grid"] ** 2
    path, rng = os.path.join(args.folder, "{}{}.npy").format, generator(0)
    with open(path("all", ""), "wb+") as f:
        f.truncate(2 * n * views * length)                                # sparse: takes no disk
        pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    pages.madvise(mmap.MADV_RANDOM)  # else a first touch reads megabytes of nothing ahead
    data.codes, data.labels = np.ndarray((n, views, length), np.uint16, pages), np.zeros(n, int)
    for i in range(files):
        np.save(path("codes", i), np.zeros((1, views, length), np.int64))
        np.save(path("labels", i), np.zeros(1, np.int64))

    def small_files():
        pairs = [(np.load(path("codes", i))[0, view], np.load(path("labels", i)))
                 for i, view in rng.integers((files, views), size=(args.batch, 2))]
        return [torch.from_numpy(np.stack(x)) for x in zip(*pairs)]

    return ({"data in one file": Row(lambda: npp.batch_at(data, next(steps), cfg), args.batch),
             "data in many files": Row(small_files, args.batch)},
            [("data, many files / one", {"data in many files": 1}, {"data in one file": 1}, None)])

def frechet_rows(args, machine):
    def gaussian(seed, d=2048):  # with a spectrum that falls, as that of real features
        x = generator(seed).standard_normal((2 * d, d)) * np.arange(1, d + 1) ** -0.5
        return x.mean(0) + seed, np.cov(x, rowvar=False)

    def scipys(mu1, cov1, mu2, cov2):
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        return np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)

    both = *gaussian(0), *gaussian(1)
    return ({"frechet": Row(partial(fid.frechet_distance, *both)),
             "frechet by scipy": Row(partial(scipys, *both))},
            [("frechet, scipy / ours", {"frechet by scipy": 1}, {"frechet": 1}, None)])

class Official(nn.Module):
    """The official model with the weights of `ours`: called with (codes, labels, p) -> its loss"""
    def __init__(self, args, ours):
        super().__init__()
        sys.path.append(args.peer)
        try:
            from autoregressive.models import generate, gpt
        except ImportError as e:
            raise BadInput(f"{args.peer}: expected the official repository ({brief(e)})") from None
        size = dict(**npp.SIZES[args.size], vocab_size=args.vocab, block_size=args.grid**2)
        self.generate, self.model = generate.generate, gpt.Transformer(gpt.ModelArgs(**size))
        self.to(ours.output.weight).model.load_state_dict(ours.state_dict())
        self.rope = {p: gpt.precompute_freqs_cis_2d(args.grid // p, ours.head_dim, 10000, 1).to(
            ours.output.weight.device) for p in (1, 2, 4)}
        patchify = gpt.target_patchify
        gpt.target_patchify = lambda codes, **how: patchify(codes, **how) if (
            torch.compiler.is_compiling()) else patchify(codes.double(), **how).long()

    def forward(self, codes, labels, p, loss=True):
        return self.model(codes, labels, targets=codes, p=p, patch_size=p * p,
                          freqs_cis=self.rope[p])[loss]  # of (logits, loss)

SECTIONS = {"train": train_rows, "sample": sample_rows, "data": data_rows, "frechet": frechet_rows}

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    for name, default, text in (
        ("what", ",".join(SECTIONS), "sections, with commas"), ("size", "tiny", "of the model"),
        ("batch", 64, "images at once"), ("rounds", 5, "rounds"), ("json", False, "lines of JSON"),
        ("vocab", 0, "codes; 0: 256 for tiny, else 16384"), ("grid", 0, "codes a side; 0: 8 or 16"),
        ("peer", "", "checkout of the official code"),
    ):
        parser.add_flag(name, default, text)
    args, machine = parser.parse_args(argv), Machine("auto")
    if not (set(args.what.split(",")) <= SECTIONS.keys() and args.size in npp.SIZES
            and min(args.batch, args.rounds, args.vocab + 1, args.grid + 1) > 0 == args.grid % 4):
        raise BadInput(f"{vars(args)}: expected what of {', '.join(SECTIONS)}; a size of "
                       f"{', '.join(npp.SIZES)}; batch and rounds 1 or more, vocab 0 or more, "
                       "grid a multiple of 4")
    tiny, args.how = args.size == "tiny", ("eager", "compiled")[: 1 + machine.gpu]
    args.vocab, args.grid = args.vocab or (16384, 256)[tiny], args.grid or (16, 8)[tiny]
    args.dtype = torch.bfloat16 if machine.gpu else torch.float32
    device = torch.cuda.get_device_name() if machine.gpu else f"{os.uname().machine} CPU"
    versions = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, np, scipy))
    show(args, note=f"{device}, {torch.get_num_threads()} threads, {versions}, {vars(args)}")
    if machine.gpu:  # each batch size is a graph of its own
        torch._dynamo.config.recompile_limit = 64
    for what in args.what.split(","):
        with tempfile.TemporaryDirectory() as args.folder:
            measure(SECTIONS[what], args, machine)
    return 0

if __name__ == "__main__":
    sys.exit(main())
