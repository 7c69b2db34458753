"""What Next Patch Prediction costs: counted, and measured on the machine at hand

    python notebooks/bench.py plan --model XXL --patches 8,4,2,1     # counts, trains nothing
    python notebooks/bench.py                                        # minutes on a CPU
    python notebooks/bench.py --size B --batch 128 --what train,sample --json --peer CLONE    # GPU

    train    a training step at p = 1, 2, 4, and the mean step of the schedule (2,1)
    sample   npp.generate by batch size, without and with guidance
    data     npp.batch_at on a folder of ImageNet's shape, beside LlamaGen's one file an image
    frechet  the distance of two Gaussians in 2048 dimensions, beside scipy's matrix root
    memory   on a GPU: the largest micro-batch of every size that fits, its step and its memory

A GPU computes in bfloat16 (training: autocast), eager and compiled; a CPU in float32. --peer is a
checkout of PKU-YuanGroup/Next-Patch-Prediction: its model with our weights, in our training step,
and its generate.

A time is the median (smallest to largest) over rounds of interleaved calls a, b, a, b, .. after a
warm-up. A ratio is taken within each round. "matmul" and "read" measure what the machine gives, and
"of" is the share of it that a row uses; in training, of matmul, the model-FLOP utilisation.
    TFLOP  2 for each weight of the linear layers and the head at each position, 6 in training;
           attention scores are not counted, as in cost() below
    GB     these weights and the filled KV cache, read once for each position drawn
GiB is what a call allocates on the GPU beyond weights, optimizer and CUDA graphs.
"""

import argparse
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import median

import numpy as np
import scipy
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import fid  # noqa: E402
import npp  # noqa: E402
from npp import require  # noqa: E402
from tokenizer import BadInput  # noqa: E402

# -------------------------------------------------------------------------------------------------
# 1. Counted


def cost(size, patches=(2, 1), lam=0.5, vocab=16384, grid=16):
    """-> (average over the schedule, [of each stage]): forward multiply-adds per image

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


def plan(argv):
    """Print what each stage of a schedule costs, and the whole beside next-token prediction"""
    parser = Parser("bench.py plan", description="Count what a run of npp.py would cost")
    parser.add_argument("--model", default="B", help="size of the model")
    parser.add_argument("--patches", type=npp.integers, default=(2, 1), help="p of each stage")
    parser.add_argument("--lam", type=float, default=0.5, help="as npp.py's")
    parser.add_argument("--epochs", type=float, default=300.0, help="passes over the images")
    parser.add_argument("--steps", type=int, default=0, help="total steps, instead of epochs")
    parser.add_argument("--batch", type=int, default=256, help="images in a step")
    parser.add_argument("--images", type=int, default=1_281_167, help="images to train on")
    parser.add_argument("--vocab", type=int, default=16384, help="codes in the vocabulary")
    parser.add_argument("--grid", type=int, default=16, help="codes along each side of an image")
    parser.add_argument("--classes", type=int, default=1000, help="classes of images")
    parser.add_argument("--tflops", type=float, default=400.0, help="TFLOP/s that the GPU reaches")
    args = parser.parse_args(argv)
    check_size(args.model)
    for name in ("epochs", "batch", "images", "vocab", "grid", "classes", "tflops"):
        value = getattr(args, name)
        require(0 < value < 1e12, f"{name} is {value}, expected more than 0")
    require(args.steps >= 0, f"steps is {args.steps}, expected 0 or more")
    steps = args.steps
    if steps == 0:
        steps = round(args.epochs * args.images / args.batch)
    npp.check_schedule(steps, args.patches, args.lam, args.grid)

    average, of_stages = cost(args.model, args.patches, args.lam, args.vocab, args.grid)
    next_token, _ = cost(args.model, (1,), args.lam, args.vocab, args.grid)
    with torch.device("meta"):
        model = npp.Transformer(**npp.SIZES[args.model], vocab=args.vocab, classes=args.classes,
                                grid=args.grid)
    parameters = sum(w.numel() for w in model.parameters())
    print(f"{args.model}, {parameters:,} parameters\n"
          "  p       steps  positions  G multiply-adds per image  share")
    for (p, first, end), x in zip(npp.stages(steps, args.patches, args.lam), of_stages):
        positions = args.grid**2 // p**2 + 1
        share = (end - first) / steps * x / average
        print(f"{p:3} {end - first:11,} {positions:10,} {x / 1e9:25.2f} {share:7.1%}")
    flop = 6 * average * steps * args.batch                 # 2 x (1 forward + 2 backward)
    print(f"average {average / 1e9:.2f}, {average / next_token:.4f} of the {next_token / 1e9:.2f} "
          f"of plain next-token prediction\ntraining, forward and backward: "
          f"{duration(flop / (args.tflops * 1e12))} on a GPU that reaches {args.tflops:g} TFLOP/s")


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.2g} seconds"
    if seconds < 3600:
        return f"{seconds / 60:.2g} minutes"
    return f"{seconds / 3600:,.1f} hours"


# -------------------------------------------------------------------------------------------------
# 2. Measured: rows, rounds and ratios


@dataclass
class Row:
    call: Callable
    images: float = 0          # that a call makes or takes
    codes: float = 0           # that it draws
    flop: float = 0            # that it must compute
    bytes: float = 0           # that it must read


@dataclass
class Ratio:
    name: str
    over: dict                 # {row: share}; the time of a schedule is a mean of its stages' times
    under: dict
    theory: float = None       # what the count of positions promises


def measure(section, args):
    """Time the rows of a section beside what the machine gives, show them and their ratios"""
    rows, ratios = section(args)
    limits = limit_rows(args)
    rows = limits | rows                                    # the limits are timed first
    seconds, peak = time_interleaved(rows, args)

    best = {"matmul": rows["matmul"].flop / median(seconds["matmul"]),
            "read": rows["read"].bytes / median(seconds["read"])}
    for name, row in rows.items():
        if name not in seconds:
            show(args, note=f"{name}: left out, it does not fit the GPU's memory")
            continue
        middle = median(seconds[name])
        shares = {"matmul": row.flop / middle / best["matmul"],
                  "read": row.bytes / middle / best["read"]}
        limit = max(shares, key=shares.get)
        rates = {"images/s": row.images / middle, "codes/s": row.codes / middle,
                 "TFLOP/s": row.flop / middle / 1e12, "GB/s": row.bytes / middle / 1e9}
        show(args, row=name, median=middle, rounds=seconds[name], **rates, GiB=peak.get(name),
             share=shares[limit], of=limit)
    for ratio in ratios:
        if seconds.keys() >= ratio.over.keys() | ratio.under.keys():
            values = mean_time(seconds, ratio.over) / mean_time(seconds, ratio.under)
            show(args, ratio=ratio.name, median=median(values), rounds=list(values),
                 theory=ratio.theory)


def time_interleaved(rows, args):
    """-> {row: seconds of each round}, {row: GiB}, without the rows that a GPU cannot hold"""
    seconds = {name: [] for name in rows}
    peak = {}
    warm_up = 2 if args.gpu else 1                          # to compile, then to record graphs
    for i in range(warm_up + args.rounds):
        for name in list(seconds):
            try:
                elapsed, gib = time_call(rows[name].call, args.gpu)
            except torch.OutOfMemoryError:
                del seconds[name]
                continue
            if i >= warm_up:
                seconds[name].append(elapsed)
                peak[name] = gib
    return seconds, peak


def time_call(call, gpu):
    """-> seconds, and GiB that the call had allocated at most (None on a CPU)"""
    if not gpu:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    return elapsed, (torch.cuda.max_memory_allocated() - before) / 2**30


def mean_time(seconds, mix):
    """Seconds of each round of a mix of rows {row: share}"""
    return sum(share * np.array(seconds[name]) for name, share in mix.items())


def show(args, **values):
    """Print one line: of JSON, or of the table"""
    if args.json:
        print(json.dumps(values), flush=True)
        return
    if "note" in values:
        print(values["note"], flush=True)
        return
    spread = f"({min(values['rounds']):.4g} to {max(values['rounds']):.4g})"
    if "row" in values:
        line = f"{values['row']:44}{values['median']:9.4f} s {spread:22}"
    else:
        line = f"{values['ratio']:44}{values['median']:9.4f}   {spread:22}"
    for name in ("images/s", "codes/s", "TFLOP/s", "GB/s", "GiB"):
        if values.get(name):
            line += f"{values[name]:10,.4g} {name}"
    if values.get("share"):
        line += f"{values['share']:7.1%} of {values['of']}"
    if values.get("theory"):
        line += f"{values['theory']:9.4f} in theory"
    print(line.rstrip(), flush=True)


def limit_rows(args):
    """What the machine gives: a large matrix product in the dtype of the rest, and a large sum"""
    side = 8192 if args.gpu else 1024
    numbers = 2**28 if args.gpu else 2**26
    a = torch.randn(side, side, device=args.device, dtype=args.dtype)
    x = torch.ones(numbers, device=args.device)

    def multiply():
        for _ in range(4):
            torch.mm(a, a)

    def read():
        for _ in range(4):
            x.sum()

    return {"matmul": Row(multiply, flop=4 * 2 * side**3), "read": Row(read, bytes=4 * 4 * numbers)}


# -------------------------------------------------------------------------------------------------
# 3. The sections: each returns {name: Row} and [Ratio]


def build(args, size):
    """-> model and optimizer as npp.py makes them, and the weights that each position meets"""
    meta = {"vocab": args.vocab, "grid": args.grid, "classes": range(1000)}
    model, optimizer = npp.build(npp.Config(model=size), meta, args.device)
    nn.init.normal_(model.output.weight, std=0.02)          # zeros would hide every difference
    weights = cost(size, (1,), vocab=args.vocab, grid=args.grid)[0] / (args.grid**2 + 1)
    return model, optimizer, weights


def random_batch(args, n):
    codes = torch.randint(args.vocab, (n, args.grid**2), device=args.device)
    return codes, torch.arange(n, device=args.device) % 1000


def train_step(loss_of, optimizer, batch, p, args):
    """What npp.py does in a step; loss_of is a module, called with codes, labels and p"""
    codes, labels = batch
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.gpu):
        loss = loss_of(codes, labels, p)
    loss.backward()
    nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_rows(args):
    model, optimizer, weights = build(args, args.size)
    batch = random_batch(args, args.batch)
    sides = {"ours": (npp.Loss(model), optimizer)}
    if args.peer:
        official = Official(args, model)
        sides["official"] = (official, torch.optim.AdamW(official.parameters(), 1e-4, fused=True))

    rows = {}
    ratios = []
    for how in args.how:
        for side, (loss_of, optimizer) in sides.items():
            if how == "compiled":
                loss_of = torch.compile(loss_of, dynamic=False)
            name = f"train {side} {how}"
            for p in (1, 2, 4):
                call = partial(train_step, loss_of, optimizer, batch, p, args)
                flop = 6 * weights * args.batch * args.grid**2 / p**2
                rows[f"{name} p={p}"] = Row(call, args.batch, flop=flop)

            for plan, shares in (("p=1", {1: 1}), ("p=2", {2: 1}), ("p=4", {4: 1}),
                                 ("(2,1)", {2: 0.5, 1: 0.5})):
                mix = {f"{name} p={p}": share for p, share in shares.items()}
                if plan != "p=1":
                    theory = sum(share / p**2 for p, share in shares.items())
                    ratios.append(Ratio(f"{name} {plan} / p=1", mix, {f"{name} p=1": 1}, theory))
                if side == "official":
                    ours = {f"train ours {how} p={p}": share for p, share in shares.items()}
                    ratios.append(Ratio(f"train {how} {plan} official / ours", mix, ours))
    return rows, ratios


def sample_rows(args):
    model, _, weights = build(args, args.size)
    model = model.to(args.dtype).eval()
    best = f"ours {args.how[-1]}"
    cases = []
    for n in sorted({max(1, args.batch // 16), max(1, args.batch // 4), args.batch}):
        cases.append((n, 1, best))
        cases.append((n, 2, best))
    if args.gpu:
        cases.append((args.batch, 2, "ours eager"))
    official = None
    if args.peer:
        official = Official(args, model).eval()
        for how in args.how:
            cases.append((args.batch, 2, f"official {how}"))

    length = args.grid**2
    rows = {}
    ratios = []
    base = f"sample {args.batch} guidance 2 {best}"
    for n, scale, who in cases:
        name = f"sample {n} guidance {scale} {who}"
        sequences = n * scale                               # guidance 2: as many for an image
        flop = 2 * weights * length * sequences
        keys_and_values = 2 * len(model.layers) * model.output.in_features
        cache = keys_and_values * sequences * length * (length + 1) / 2
        read = (weights * length + cache) * args.dtype.itemsize
        call = sampler(args, model, official, who, n, scale)
        rows[name] = Row(call, n, n * length, flop, read)
        if n == args.batch and name != base:
            ratios.append(Ratio(f"{name} / guidance 2 {best}", {name: 1}, {base: 1}))
    return rows, ratios


def sampler(args, model, official, who, n, scale):
    """-> a call that draws n images"""
    labels = torch.arange(n, device=args.device) % 1000
    if who == "ours eager":
        return partial(npp.generate, model, labels, float(scale))
    if who == "ours compiled":  # it is kept, so its CUDA graphs are recorded once
        cached = npp.CompiledModel(model, n * scale)
        return partial(npp.generate, model, labels, float(scale), cached=cached)
    network = official.model
    if who == "official compiled":  # as in the official script
        network = torch.compile(network, mode="reduce-overhead", fullgraph=True)
    return partial(official.generate, network, labels, max_new_tokens=args.grid**2,
                   cfg_scale=float(scale))


def data_rows(args):
    images = 1_281_167                                      # as ImageNet, encoded by ten crops
    views = 10
    cells = 256
    folder = args.folder
    # No code is ever written, so the file is a hole that takes no disk.
    np.lib.format.open_memmap(f"{folder}/codes.npy", "w+", np.uint16, (images, views, cells))
    np.save(f"{folder}/labels.npy", np.zeros(images, np.int64))
    with open(f"{folder}/meta.json", "w") as f:
        json.dump({"vocab": 16384, "grid": 16, "image_size": 256, "tokenizer": None,
                   "tokenizer_sha256": None, "classes": [str(i) for i in range(1000)]}, f)
    data = npp.Codes(folder)
    data.codes._mmap.madvise(mmap.MADV_RANDOM)              # else a read fetches megabytes of hole
    cfg = npp.Config(batch=args.batch)
    steps = count()

    files = 1024
    for i in range(files):
        np.save(f"{folder}/codes{i}.npy", np.zeros((1, views, cells), np.int64))
        np.save(f"{folder}/labels{i}.npy", np.zeros(1, np.int64))
    rng = np.random.default_rng(0)

    def one_file():
        npp.batch_at(data, next(steps), cfg)

    def many_files():
        codes = []
        labels = []
        for i, view in rng.integers((files, views), size=(args.batch, 2)):
            codes.append(np.load(f"{folder}/codes{i}.npy")[0, view])
            labels.append(np.load(f"{folder}/labels{i}.npy"))
        return torch.from_numpy(np.stack(codes)), torch.from_numpy(np.stack(labels))

    rows = {"data in one file": Row(one_file, args.batch),
            "data in many files": Row(many_files, args.batch)}
    return rows, [Ratio("data, many files / one", {"data in many files": 1},
                        {"data in one file": 1})]


def frechet_rows(args, d=2048):
    def gaussian(seed):
        """Moments with a spectrum that falls, as that of real features"""
        x = np.random.default_rng(seed).standard_normal((2 * d, d)) * np.arange(1, d + 1) ** -0.5
        return x.mean(0) + seed, np.cov(x, rowvar=False)

    mu1, cov1 = gaussian(0)
    mu2, cov2 = gaussian(1)

    def ours():
        return fid.frechet_distance(mu1, cov1, mu2, cov2)

    def by_scipy():
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        return np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)

    rows = {"frechet": Row(ours), "frechet by scipy": Row(by_scipy)}
    return rows, [Ratio("frechet, scipy / ours", {"frechet by scipy": 1}, {"frechet": 1})]


class Official(nn.Module):
    """The official model with the weights of ours: called with codes, labels and p -> its loss"""

    def __init__(self, args, ours):
        super().__init__()
        sys.path.append(args.peer)
        try:
            from autoregressive.models import generate, gpt
        except ImportError as error:
            raise BadInput(f"{args.peer}: expected the official repository ({error})") from None
        weight = ours.output.weight
        size = npp.SIZES[args.size]
        sizes = gpt.ModelArgs(**size, vocab_size=args.vocab, block_size=args.grid**2)
        self.generate = generate.generate
        self.model = gpt.Transformer(sizes).to(weight)
        self.model.load_state_dict(ours.state_dict())
        self.rope = {}
        for p in (1, 2, 4):
            rope = gpt.precompute_freqs_cis_2d(args.grid // p, ours.head_dim, 10000, 1)
            self.rope[p] = rope.to(weight.device)

        patchify = gpt.target_patchify

        def patchify_floats(codes, **sizes):
            # Eager code has no F.unfold of integers: it goes through float64, which is exact.
            if torch.compiler.is_compiling():
                return patchify(codes, **sizes)
            return patchify(codes.double(), **sizes).long()

        gpt.target_patchify = patchify_floats

    def forward(self, codes, labels, p):
        _, loss = self.model(codes, labels, targets=codes, p=p, patch_size=p * p,
                             freqs_cis=self.rope[p])
        return loss


def show_memory(args):
    """For every size: double the micro-batch until the GPU's memory is full; eager"""
    if not args.gpu:
        show(args, note="memory: left out, it needs a GPU")
        return
    for size in npp.SIZES:
        largest = None
        micro_batch = 1
        try:
            model, optimizer, _ = build(args, size)
            while micro_batch <= 1024:
                batch = random_batch(args, micro_batch)
                step = partial(train_step, npp.Loss(model), optimizer, batch, 1, args)
                step()                                      # makes the optimizer's moments
                seconds, _ = time_call(step, args.gpu)
                gib = torch.cuda.max_memory_allocated() / 2**30
                largest = (micro_batch, seconds, gib)
                micro_batch *= 2
        except torch.OutOfMemoryError:
            pass
        model = optimizer = step = batch = None             # frees the memory for the next size
        torch.cuda.empty_cache()
        if largest is None:
            show(args, note=f"memory {size}: not even one image fits")
        else:
            n, seconds, gib = largest
            show(args, micro_batch=n, seconds=seconds, GiB=gib, note=f"memory {size}: micro-batch "
                 f"{n}, a step {seconds:.4f} s, at most {gib:.1f} GiB")


# -------------------------------------------------------------------------------------------------
# 4. Command line

SECTIONS = {"train": train_rows, "sample": sample_rows, "data": data_rows, "frechet": frechet_rows,
            "memory": None}


class Parser(argparse.ArgumentParser):
    def __init__(self, name, description):
        super().__init__(name, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise BadInput(message)


def check_size(size):
    require(size in npp.SIZES, f"size is {size}, expected one of {', '.join(npp.SIZES)}")


def measure_all(argv):
    parser = Parser("bench.py", description=__doc__)
    parser.add_argument("--what", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--size", default="tiny", help="of the model")
    parser.add_argument("--batch", type=int, default=64, help="images at once")
    parser.add_argument("--rounds", type=int, default=5, help="how often each call is timed")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument("--vocab", type=int, default=0, help="codes; 0: 256 for tiny, else 16384")
    parser.add_argument("--grid", type=int, default=0, help="codes a side; 0: 8 for tiny, else 16")
    parser.add_argument("--peer", default="", help="checkout of the official code")
    args = parser.parse_args(argv)
    sections = args.what.split(",")
    for name in sections:
        require(name in SECTIONS, f"what is {args.what}, expected some of {', '.join(SECTIONS)}")
    check_size(args.size)
    require(args.batch > 0, f"batch is {args.batch}, expected 1 or more")
    require(args.rounds > 0, f"rounds is {args.rounds}, expected 1 or more")
    require(args.vocab >= 0, f"vocab is {args.vocab}, expected 0 or more")
    require(args.grid >= 0 and args.grid % 4 == 0, f"grid is {args.grid}, expected multiples of 4")
    if args.vocab == 0:
        args.vocab = 256 if args.size == "tiny" else 16384
    if args.grid == 0:
        args.grid = 8 if args.size == "tiny" else 16

    flags = dict(vars(args))
    _, _, args.device = npp.setup()
    args.gpu = args.device.type == "cuda"
    args.dtype = torch.float32
    args.how = ["eager"]
    name = f"{os.uname().machine} CPU"
    if args.gpu:
        args.dtype = torch.bfloat16
        args.how = ["eager", "compiled"]
        name = torch.cuda.get_device_name()
        torch._dynamo.config.recompile_limit = 64           # each batch size is a graph of its own
    show(args, note=f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
         f"numpy {np.__version__}, scipy {scipy.__version__}, {flags}")
    for section in sections:
        if section == "memory":
            show_memory(args)
            continue
        with tempfile.TemporaryDirectory() as args.folder:
            measure(SECTIONS[section], args)


def main(argv=None):
    """-> exit code: 0, 2 after bad input, 130 after Ctrl-C"""
    if argv is None:
        argv = sys.argv[1:]
    try:
        if argv[:1] == ["plan"]:
            plan(argv[1:])
        else:
            measure_all(argv)
    except BadInput as error:
        print("bench.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
