"""Does Next Patch Prediction hold on the embedded data? Runs with several seeds, and their report

    python notebooks/evidence.py run                  # hours on a CPU; stop and go on at will
    python notebooks/evidence.py run --only constant,plain,2-1 --seeds 3,4
    python notebooks/evidence.py run --only constant --lr 4e-3
    python notebooks/evidence.py run --only plain,2-1 --images 6000 --dropout 0.1 --steps 2400
    python notebooks/evidence.py run --size B --steps 14000            # for a GPU
    python notebooks/evidence.py report               # the lines -> evidence.md, evidence_*.png

`run` appends a line of JSON for each finished run to evidence.jsonl and skips those that are there.
It knows a run by its name, so give a run that you change a new name. Started twice, it shares the
work; stopped in any way, the same command goes on to the same numbers.
Distances are FD(fashion-classifier), not FID: the features are those of data/fashion/features.pt.

NPP differs from LlamaGen's published models in two ways. It trains on patches first, and its
learning rate warms up and decays in each stage, where theirs was constant. The paper changes both
at once. The runs called constant, plain, constant_2-1 and 2-1 change one at a time.
"""

import argparse
import fcntl
import inspect
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from scipy import stats

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
sys.path.insert(0, HERE)

import bench  # noqa: E402
import fid  # noqa: E402
import npp  # noqa: E402
from npp import require  # noqa: E402
from tokenizer import (  # noqa: E402
    BadInput,
    Parser,
    load_file,
    load_tokenizer,
    replace_file,
)

DATA = os.path.join(ROOT, "data", "fashion")
GRID = 8                       # codes along each side of its images
FD = "FD(fashion-classifier)"
VERSION = 2                    # of the scores. Lines without it are of version 1, which scored
#                                guidance 3 ("fixed" in these lines) and the best of 2, 3, 4, in
#                                bfloat16 on a CPU too. Their losses compare with those of today.
SWEEP = (1.5, 2.0, 3.0)        # guidance scales. The best is chosen by FEW samples of other noise.
FEW = 500
CHUNK = 500                    # samples drawn at once
PARTS = 6                      # a run validates, and saves, after each sixth

# -------------------------------------------------------------------------------------------------
# 1. What may vary, as functions that a reader can change
#
# rate(step, cfg, warmup) is the learning rate, with the warm-up of an epoch in steps.
# batches(step, cfg) are the indices, for npp.batch_at, of the batches that a step takes.
# loss(model, codes, labels, p) is what it minimises.
#
# Whatever varies, the last stage trains npp.py's model in the usual way at p = 1. So npp.py can
# validate every run and draw its samples.


def npp_schedule(step, cfg, warmup):
    """Warm-up, plateau and decay in each stage: what npp.py does"""
    return npp.lr_at(step, cfg.steps, cfg.patches, cfg.lam, cfg.lr * cfg.batch / 256, cfg.lr_min,
                     warmup, cfg.decay_frac)


def constant_rate(step, cfg, warmup):
    """LlamaGen's recipe; npp.py --warmup_epochs 0 --decay_frac 0"""
    return npp_schedule(step, replace(cfg, decay_frac=0.0), warmup=0)


def constant_after_warmup(step, cfg, warmup):
    """npp.py --decay_frac 0"""
    return npp_schedule(step, replace(cfg, decay_frac=0.0), warmup)


def doubled_on_patches(step, cfg, warmup):
    p, _, _ = npp.stage(step, cfg.steps, cfg.patches, cfg.lam)
    if p > 1:
        cfg = replace(cfg, lr=2 * cfg.lr)
    return npp_schedule(step, cfg, warmup)


def one_batch(step, cfg):
    return [step]


def k_batches(step, cfg):
    """K = p * p batches in a patch step, which then costs about as much as a step at p = 1"""
    used = 0
    for p, first, end in npp.stages(cfg.steps, cfg.patches, cfg.lam):
        k = p * p
        if step < end:
            first_batch = used + (step - first) * k
            return list(range(first_batch, first_batch + k))
        used += (end - first) * k


def usual_loss(model, codes, labels, p):
    return model.loss(codes, labels, p)


def loss_of_inputs(model, x, codes, labels, p, rope):
    """The loss for other inputs x (B, N/K, D) and positions than Transformer.forward's"""
    x = torch.cat([model.embed_class(labels), x[:, :-1]], dim=1)        # (B, N/K, D)
    x = model.tok_dropout(x)
    for layer in model.layers:
        x = layer(x, rope[:-1])
    logits = model.output(model.norm(x)).float()                        # (B, N/K, V)
    return npp.npp_loss(logits, npp.patch_targets(codes, p))


def rescale(x, p):
    """An average of K independent embeddings is sqrt(K) = p times too small: give it back"""
    return p * npp.patchify(x, p)


def rescaled_embeddings(model, codes, labels, p):
    x = rescale(model.tok_embeddings(codes), p)
    rope = npp.rope_2d(model.grid // p, model.head_dim, x.device)
    return loss_of_inputs(model, x, codes, labels, p, rope)


def rope_of_averages(grid, head_dim, p, device=None):
    """A patch stands at the mean position of its codes, in units of codes and not of patches

    The position of its first code does as well: for every patch it is the mean less (p - 1) / 2
    in row and column, and attention sees only differences of positions. The class has no position
    (its rotation is all zeros), in npp.rope_2d too.
    """
    rope = npp.rope_2d(grid, head_dim, device)                          # (1 + N, head_dim/2, 2)
    of_codes = rearrange(rope[1:], "(row column) f xy -> row column f xy", row=grid)
    of_patches = rearrange(of_codes[::p, ::p], "row column f xy -> (row column) f xy")
    return torch.cat([rope[:1], of_patches])                            # (1 + N/K, head_dim/2, 2)


def averaged_positions(model, codes, labels, p):
    x = npp.patchify(model.tok_embeddings(codes), p)
    rope = rope_of_averages(model.grid, model.head_dim, p, x.device)
    return loss_of_inputs(model, x, codes, labels, p, rope)


def blocks_from_each_code(codes, p):
    """The codes of the p x p block that begins at each code: (B, N) -> (B, N, K)

    Blocks that would leave the image repeat its last row or column.
    """
    h = math.isqrt(codes.shape[1])
    images = rearrange(codes, "b (h w) -> b h w", h=h)
    index = torch.arange(h, device=codes.device)
    blocks = []
    for row in range(p):
        for column in range(p):
            rows = (index + row).clamp(max=h - 1)
            columns = (index + column).clamp(max=h - 1)
            blocks.append(images[:, rows][:, :, columns].flatten(1))    # (B, N)
    return torch.stack(blocks, dim=-1)


def output_only(model, codes, labels, p):
    """Nothing is averaged: after each code the model predicts a whole block of those to come"""
    return npp.npp_loss(model(codes, labels), blocks_from_each_code(codes, p))


# -------------------------------------------------------------------------------------------------
# 2. The runs


@dataclass
class Variant:
    what: str                              # as tables and figures call it
    patches: tuple = (2, 1)
    lam: float = 0.5
    share: float = 1.0                     # of --steps
    rate: Callable = npp_schedule
    batches: Callable = one_batch
    loss: Callable = usual_loss
    resets_optimizer: bool = False         # AdamW forgets its moments where a stage begins
    against: tuple = ("2-1",)              # the runs that the report compares it with


def spent(variant, steps, until=math.inf):
    """Forward multiply-adds until a step of a run, counted as in the paper, in steps at p = 1

    The ratio of a patch step to a step at p = 1 is that of their positions, in every size.
    """
    cfg = npp.Config(steps=steps, patches=variant.patches, lam=variant.lam)
    at_1, _ = bench.cost("tiny", (1,), grid=GRID)
    total = 0.0
    for p, first, end in npp.stages(steps, variant.patches, variant.lam):
        at_p, _ = bench.cost("tiny", (p,), grid=GRID)
        if variant.loss is output_only:
            at_p = at_1
        step_cost = len(variant.batches(first, cfg)) * at_p / at_1
        total += max(0, min(until, end) - first) * step_cost
    return total


def mean_cost(variant):
    """Multiply-adds of a mean step, in those of a step at p = 1"""
    return spent(variant, 1_000_000) / 1_000_000


TUNED = "constant, lr 0.004"   # as arms_of calls the best rate of those tried for size tiny
NPP = Variant("(2,1), NPP's schedule", against=("plain", "equal_cost", "constant", TUNED))
K_TIMES = Variant("(2,1), K times the images at p = 2", batches=k_batches,
                  against=("k_times_cost", "plain", "2-1"))
K_TIMES_SHORT = Variant("(2,1), lam 0.3, K times the images at p = 2", lam=0.3, batches=k_batches,
                        against=("k_times_0.3_cost", "plain", "2-1"))

VARIANTS = {
    # LlamaGen's recipe and NPP's, and what lies between
    "constant": Variant("next token, constant rate: LlamaGen's recipe", (1,), rate=constant_rate,
                        against=()),
    "plain": Variant("next token, NPP's schedule", (1,),
                     against=("constant", TUNED, "constant_warmup")),
    "constant_2-1": Variant("(2,1), constant rate", rate=constant_rate,
                            against=("constant", "2-1")),
    "2-1": NPP,
    "constant_warmup": Variant("next token, constant rate after warm-up", (1,),
                               rate=constant_after_warmup, against=("constant",)),
    "equal_cost": Variant("next token, NPP's schedule, at the cost of (2,1)", (1,),
                          share=mean_cost(NPP), against=("plain",)),
    "constant_equal_cost": Variant("next token, constant rate, at the cost of (2,1)", (1,),
                                   share=mean_cost(NPP), rate=constant_rate,
                                   against=("constant", "constant_2-1", "2-1")),
    # More images in a patch step, and next token at the cost that this really has
    "k_times": K_TIMES,
    "k_times_cost": Variant("next token, at the cost of K times the images", (1,),
                            share=mean_cost(K_TIMES), against=()),
    "k_times_0.3": K_TIMES_SHORT,
    "k_times_0.3_cost": Variant("next token, at the cost of K times the images, lam 0.3", (1,),
                                share=mean_cost(K_TIMES_SHORT), against=()),
    "output_only": Variant("(2,1), patches in the output only", loss=output_only,
                           against=("plain", "2-1")),
    # Other schedules of patches, and what the paper leaves open
    "4-1": Variant("(4,1)", (4, 1)),
    "lam_3_4": Variant("(2,1), lam 3/4", lam=3 / 4),
    "4-2-1": Variant("(4,2,1)", (4, 2, 1)),
    "lam_2_3": Variant("(2,1), lam 2/3", lam=2 / 3),
    "lam_4_5": Variant("(2,1), lam 4/5", lam=4 / 5),
    "8-4-2-1": Variant("(8,4,2,1)", (8, 4, 2, 1)),
    "rescaled": Variant("(2,1), embeddings x sqrt(K)", loss=rescaled_embeddings),
    "averaged_positions": Variant("(2,1), averaged positions", loss=averaged_positions,
                                  against=("2-1", "equal_cost", "plain")),
    "optimizer_reset": Variant("(2,1), optimizer reset", resets_optimizer=True),
    "double_rate": Variant("(2,1), rate x 2 at p = 2", rate=doubled_on_patches),
    "lam_0.3": Variant("(2,1), lam 0.3", lam=0.3),
    "lam_0.2": Variant("(2,1), lam 0.2", lam=0.2),
}
PAPER = {  # Table 3: FID of sizes B and L on ImageNet; (4,1)'s by the differences in Sec. 4.5
    "constant": (5.46, 3.80), "2-1": (4.47, 2.76), "4-1": (4.92, 2.89), "4-2-1": (4.62, 2.79),
    "8-4-2-1": (4.68, 2.84), "lam_2_3": ("–", 2.79), "lam_3_4": ("–", 2.81),
    "lam_4_5": ("–", 2.92)}

# -------------------------------------------------------------------------------------------------
# 3. One run: train, sample, score


def read_batches(data, indices, cfg, device):
    codes = []
    labels = []
    for index in indices:
        c, y = npp.batch_at(data, index, cfg)
        codes.append(c)
        labels.append(y)
    return torch.cat(codes).to(device), torch.cat(labels).to(device)


def clock():
    """Seconds of this process: of CPU time, summed over its threads, and on the wall"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.process_time(), time.perf_counter()])


def train(variant, cfg, data, path):
    """Train, or go on from the checkpoint at path -> model, [[step, validation loss]], seconds

    The weights are bit for bit those of npp.py where it can do the same, on one CPU.
    """
    _, _, device = npp.setup()
    npp.check_schedule(cfg.steps, cfg.patches, cfg.lam, data.meta["grid"])
    model, optimizer = npp.build(cfg, data.meta, device)
    first = 0
    validation = []
    seconds = np.zeros(2)                               # without validation, and what is repeated
    if os.path.exists(path):
        saved = load_file(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        validation = saved["validation"]
        seconds = np.array(saved["seconds"])

    loss_of = variant.loss
    if cfg.compile == "true":
        loss_of = torch.compile(loss_of, dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    warmup = cfg.warmup_epochs * len(data.codes) / cfg.batch            # in steps
    marks = {round(cfg.steps * i / PARTS) for i in range(1, PARTS + 1)}
    start = clock()
    for step in range(first, cfg.steps):
        p, stage_first, _ = npp.stage(step, cfg.steps, cfg.patches, cfg.lam)
        if variant.resets_optimizer and step == stage_first:
            optimizer.state.clear()
        lr = variant.rate(step, cfg, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        codes, labels = read_batches(data, variant.batches(step, cfg), cfg, device)
        dropout_seed = np.random.default_rng((cfg.seed, npp.DROPOUT, step, 0)).integers(2**62)
        torch.manual_seed(dropout_seed)

        with autocast:
            loss = loss_of(model, codes, labels, p)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if done in marks:
            seconds += clock() - start
            val_loss = npp.validate(model, data, cfg, device)
            require(math.isfinite(val_loss), f"the validation loss is {val_loss} at step {done}")
            print(f"  step {done:,}  p {p}  val {val_loss:.4f}", flush=True)
            validation.append([done, val_loss])
            save(path, model, optimizer, step=done, validation=validation,
                 seconds=seconds.tolist())
            start = clock()
    return model, validation, seconds


def save(path, model, optimizer, **values):
    def write(f):
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), **values), f)

    replace_file(path, write)


@torch.no_grad()
def draw(model, data, cfg, guidance, seed, n):
    """n samples, of all classes in turn -> uint8 images (n, H, W, 3), labels (n,)"""
    device = model.output.weight.device
    labels = torch.arange(n) % len(data.meta["classes"])
    tokenizer = load_tokenizer(data.meta["tokenizer"], device, data.meta)
    cfg = replace(cfg, seed=seed, cfg_scale=guidance, micro_batch=CHUNK)
    return np.concatenate(list(npp.draw(model, tokenizer, labels, cfg))), labels.numpy()


def score(model, data, cfg, samples):
    """-> FD by guidance scale, and all scores at the best of these scales

    On a CPU in float32: there bfloat16 takes five times as long to draw the same.
    """
    device = model.output.weight.device
    reference = os.path.join(cfg.data, "reference.npz")
    net = fid.load_network(os.path.join(cfg.data, "features.pt"), device)
    statistics, _ = fid.open_reference(reference, net)
    sweep = {}
    for guidance in SWEEP:
        images, _ = draw(model, data, cfg, guidance, cfg.seed + 1000, FEW)
        _, moments = fid.extract(net, images, keep=False)
        sweep[guidance] = fid.frechet_distance(*moments[0].statistics(), *statistics[0])
    best = min(sweep, key=sweep.get)
    images, labels = draw(model, data, cfg, best, cfg.seed, samples)
    scores = fid.evaluate(net, images, labels, reference)
    return sweep, dict(scores, guidance=best)


def run_one(key, cfg, data, folder, samples):
    """-> the line of one run, a dict that begins with its key"""
    variant = VARIANTS[key["run"]]
    torch.compiler.reset()  # on a GPU, or too many graphs pile up in one process
    model, validation, seconds = train(variant, cfg, data, os.path.join(folder, "ckpt.pt"))
    model.to(getattr(torch, cfg.dtype))
    start = clock()
    sweep, best = score(model, data, cfg, samples)
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    at_1, _ = bench.cost(cfg.model, (1,), vocab=data.meta["vocab"], grid=data.meta["grid"])
    return dict(
        key, patches=cfg.patches, lam=cfg.lam, steps=cfg.steps,
        cost=spent(variant, cfg.steps) * at_1 * cfg.batch,              # forward multiply-adds
        seconds=seconds.round(1).tolist(), scoring_seconds=(clock() - start).round(1).tolist(),
        val_loss=validation[-1][1], fixed=None, sweep=sweep, best=best, validation=validation,
        curve=[], machine=machine, torch=torch.__version__, samples_dtype=cfg.dtype, chunk=CHUNK)


@lru_cache
def usual(size):
    """The Config that npp.py takes for a size"""
    return npp.parse(["--model", size])


def read_lines(path):
    """What a .jsonl holds, or nothing; old lines lack what they did not vary"""
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            for text in f:
                try:
                    line = json.loads(text)
                except ValueError as error:
                    raise BadInput(f"{path}: not lines of JSON: {error}") from None
                cfg = usual(line["size"])
                defaults = dict(images=60_000, dropout=cfg.dropout, lr=cfg.lr, version=1)
                lines.append(defaults | line)
    return lines


def comparison_name(line):
    """Runs whose lines have the same one are compared with each other"""
    name = "{size}_{grid_steps}_{batch}".format(**line)
    if line["version"] > 1:
        name += "_{images}_dropout_{dropout:g}".format(**line)
    return name


def run(args):
    """Train and score the runs that are not done

    A lock on the folder of a run, which ends with this process, keeps other processes off it.
    """
    names = list(VARIANTS)
    if args.only:
        names = args.only.split(",")
    for name in names:
        require(name in VARIANTS, f"only is {args.only}, expected some of {', '.join(VARIANTS)}")
    bench.check_size(args.size)
    require(min(args.seeds) >= 0, f"seeds is {args.seeds}, expected 0 or more")
    require(args.steps >= PARTS, f"steps is {args.steps}, expected {PARTS} or more")
    require(FEW <= args.samples <= 10_000,
            f"samples is {args.samples}, expected {FEW} to 10,000, as many as there are real ones")
    data = npp.Codes(DATA)
    images = args.images
    if images == 0:
        images = len(data.codes)
    require(0 < images <= len(data.codes), f"images is {images}, expected 1 to {len(data.codes)}")
    data.codes = data.codes[:images]
    data.labels = data.labels[:images]

    for seed in args.seeds:
        for name in names:
            variant = VARIANTS[name]
            flags = ["--model", args.size, "--data", DATA, "--seed", str(seed)]
            if args.lr:
                flags += ["--lr", args.lr]
            if args.dropout:
                flags += ["--dropout", args.dropout]
            cfg = npp.parse(flags)
            cfg.patches = variant.patches
            cfg.lam = variant.lam
            cfg.steps = round(variant.share * args.steps)
            key = dict(run=name, seed=seed, size=args.size, grid_steps=args.steps, batch=cfg.batch,
                       images=images, dropout=cfg.dropout, lr=cfg.lr, version=VERSION)
            folder = os.path.join(args.out, comparison_name(key), f"{name}_lr_{cfg.lr:g}_s{seed}")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if any(key.items() <= line.items() for line in read_lines(args.results)):
                    continue
                print(f"{name}, seed {seed}, lr {cfg.lr:g}", flush=True)
                line = run_one(key, cfg, data, folder, args.samples)
                with open(args.results, "ab", buffering=0) as f:        # one write: never mixed
                    f.write(json.dumps(line).encode() + b"\n")
                print(f"  {FD} {line['best'][FD]:.4f}", flush=True)


# -------------------------------------------------------------------------------------------------
# 4. The report


def scores_of(line):
    """-> {column: value} of one line; KID and what follows are at the guidance of its first FD"""
    scores = {"validation loss": line["val_loss"],
              "lowest on the way": min(loss for _, loss in line["validation"])}
    main = line["best"]
    if line["fixed"]:
        main = line["fixed"]
        scores["FD at guidance 3"] = main[FD]
    scores["FD at the best guidance"] = line["best"][FD]
    scores["KID x 1000"] = 1000 * main["KID"]
    for name in ("precision", "recall", "class_accuracy"):
        scores[name.replace("_", " ")] = main[name]
    return scores


def digits_of(column):
    """Digits after the point"""
    if "loss" in column or "lowest" in column:
        return 4
    return 1 if column == "KID x 1000" else 3


def arms_of(lines):
    """-> {name: lines} in the order of VARIANTS; a name is a run, with its rate if not the usual"""
    arms = {}
    for run_name in VARIANTS:
        of_run = [line for line in lines if line["run"] == run_name]
        for lr in sorted({line["lr"] for line in of_run}):
            name = run_name + rate_label(of_run[0]["size"], lr)
            arms[name] = [line for line in of_run if line["lr"] == lr]
    return arms


def rate_label(size, lr):
    """Nothing for the usual rate of a size"""
    if lr == usual(size).lr:
        return ""
    return f", lr {lr:g}"


def label_of(arm):
    """The lines of an arm -> what to call it"""
    return VARIANTS[arm[0]["run"]].what + rate_label(arm[0]["size"], arm[0]["lr"])


def values_of(lines, column):
    """-> {seed: value}"""
    values = {}
    for line in lines:
        if column in scores_of(line):
            values[line["seed"]] = scores_of(line)[column]
    return values


def mean_and_deviation(values, digits):
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def interval(differences, digits):
    """Paired differences -> their mean with a 95 % confidence interval by Student's t, in words"""
    n = len(differences)
    if n < 2:
        return "–"
    mean = np.mean(differences)
    half = stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)
    word = "not separated"
    if mean + half < 0:
        word = "lower"
    if mean - half > 0:
        word = "higher"
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}] {word}"


def versus(a, b, digits):
    """{seed: value} of two arms -> a - b over common seeds, which share weights and batches"""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], digits)


def table(head, rows):
    lines = []
    for row in [head, ["---"] * len(head)] + rows:
        cells = " | ".join(str(cell) for cell in row)
        lines.append(f"| {cells} |\n")
    return "".join(lines)


def table_of_arms(arms, columns):
    """The paper's FIDs stand only beside its own setting: npp.py's rate and all images"""
    rows = []
    for name, lines in arms.items():
        run_name = lines[0]["run"]
        cost = spent(VARIANTS[run_name], lines[0]["steps"]) / lines[0]["grid_steps"]
        seconds = [line["seconds"][0] for line in lines if line["seconds"]]
        row = [label_of(lines), len(lines), f"{cost:.3f}"]
        row.append(mean_and_deviation(seconds, 0) if seconds else "–")
        for column in columns:
            values = list(values_of(lines, column).values())
            row.append(mean_and_deviation(values, digits_of(column)))
        row.append(", ".join(f"{line['best']['guidance']:g}" for line in lines))
        if name == run_name and lines[0]["images"] == 60_000:
            row.extend(PAPER.get(run_name, ("–", "–")))
        else:
            row.extend(("–", "–"))
        rows.append(row)
    head = ["run", "seeds", "cost", "CPU seconds"] + columns
    return table(head + ["best guidances", "paper: FID of B", "of L"], rows)


def table_of_differences(arms, columns):
    rows = []
    for name, lines in arms.items():
        run_name = lines[0]["run"]
        others = VARIANTS[run_name].against
        if name != run_name:
            others = (run_name,)                            # the same run at the usual rate
        for other in others:
            if other in arms:
                row = [f"{label_of(lines)} **minus** {label_of(arms[other])}"]
                for column in columns:
                    a = values_of(lines, column)
                    b = values_of(arms[other], column)
                    row.append(versus(a, b, digits_of(column)))
                rows.append(row)
    if not rows:
        return ""
    return ("Differences over common seeds:\n\n"
            f"{table(['difference'] + columns, rows)}\n")


def decomposition(arms, columns):
    """The paper's comparison, taken apart by the 2 x 2 of learning-rate schedules and patches"""
    corners = ("constant", "plain", "constant_2-1", "2-1")
    if not all(name in arms for name in corners):
        return ""
    effects = {"schedule: NPP's for the constant rate, next token": {},
               "patches: (2,1) for next token, constant rate": {},
               "interaction: both together, beyond the sum of the two": {},
               "total: (2,1) with NPP's schedule minus LlamaGen's recipe": {}}
    for column in columns:
        values = [values_of(arms[name], column) for name in corners]
        seeds = sorted(set.intersection(*[set(of_arm) for of_arm in values]))
        constant, plain, patches, both = np.array([[of_arm[s] for s in seeds] for of_arm in values])
        parts = (plain - constant, patches - constant, both - plain - patches + constant,
                 both - constant)
        for effect, part in zip(effects.values(), parts):
            effect[column] = interval(part, digits_of(column))
    rows = [[name] + list(effect.values()) for name, effect in effects.items()]
    return ("The paper's comparison, taken apart over common seeds (schedule + patches + "
            f"interaction = total):\n\n{table(['effect'] + columns, rows)}\n")


def describe(name, lines):
    """-> the report on runs that are compared with each other, in markdown"""
    arms = arms_of(lines)
    columns = list(scores_of(lines[0]))
    compared = ["validation loss", "FD at the best guidance", "class accuracy"]
    if lines[0]["images"] < 60_000:  # where runs may overfit, and end above their lowest
        compared.insert(1, "lowest on the way")
    else:
        columns.remove("lowest on the way")
    differences = decomposition(arms, compared) + table_of_differences(arms, compared)
    line = lines[0]
    best = line["best"]
    text = (f"## Size {line['size']}, {line['grid_steps']:,} steps of {line['batch']} images, "
            f"{line['images']:,} images, dropout {line['dropout']:g}, scores of version "
            f"{line['version']}\n\n"
            f"{len(lines)} runs on {line['machine']}, torch {line['torch']}. {best['n']:,} samples "
            f"a score, in {line['samples_dtype']}; the best guidance of "
            f"{', '.join(line['sweep'])} is chosen by {FEW} samples of other noise. As many real "
            f"images as samples get an FD of {best['real_against_real']:.4f}.\n\n"
            f"![validation loss and FD against cost](evidence_{name}.png)\n\n"
            f"{table_of_arms(arms, columns)}\n")
    if line["fixed"]:
        text += "KID, precision, recall and class accuracy are those at guidance 3.\n\n"
    count = differences.count(" [")
    if count > 0:
        text += (f"{differences}In brackets: 95 % confidence intervals. They are {count}; one in "
                 "twenty would exclude 0 by chance alone, and none is corrected for that.\n\n")
    return text


def mean_validation(lines):
    """-> steps at which all runs of an arm were validated, mean loss at each"""
    curves = [dict(line["validation"]) for line in lines]
    steps = sorted(set.intersection(*[set(curve) for curve in curves]))
    losses = [np.mean([curve[step] for curve in curves]) for step in steps]
    return steps, losses


def figure(arms, path):
    """Validation loss along training and FD at the end, against cost"""
    import matplotlib  # of the extra `notebooks`, which runs do without
    from matplotlib.figure import Figure

    fig = Figure((13, 7), layout="constrained")
    left, right = fig.subplots(1, 2)
    colors = matplotlib.colormaps["tab20"].colors
    lowest = math.inf
    most = max(lines[0]["grid_steps"] for lines in arms.values())
    for i, lines in enumerate(arms.values()):
        variant = VARIANTS[lines[0]["run"]]
        steps, losses = mean_validation(lines)
        costs = [spent(variant, lines[0]["steps"], step) for step in steps]
        style = dict(color=colors[i % len(colors)], label=f"{label_of(lines)} ({len(lines)})")
        left.plot(costs, losses, ".-", **style)
        lowest = min(lowest, min(losses))

        distances = list(values_of(lines, "FD at the best guidance").values())
        deviation = np.std(distances, ddof=1) if len(distances) > 1 else 0
        place = costs[-1] + (i - len(arms) / 2) * most / 200  # runs of one cost, side by side
        right.errorbar(place, np.mean(distances), deviation, fmt="o", capsize=3, **style)
    left.set(title="Validation loss at p = 1, mean over seeds",
             ylabel="nats per code (patch stages begin far above)",
             ylim=(lowest - 0.1, lowest + 1.3))
    right.set(title="Distance of samples at the end, mean ± standard deviation",
              ylabel=f"{FD} at the best guidance, lower is better")
    cost = "cost: forward multiply-adds, in training steps at p = 1"
    left.set_xlabel(cost)
    right.set_xlabel(cost + "\n(runs of one cost are drawn side by side)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, title="run (seeds)", title_fontsize=7)

    def write(f):
        fig.savefig(f, format="png", dpi=110)

    replace_file(path, write)


def report(args):
    """Write evidence.md, and a figure for each comparison, beside the lines"""
    lines = read_lines(args.results)
    require(lines, f"{args.results}: missing or empty, expected the lines of `run`")
    folder = os.path.dirname(os.path.abspath(args.results))
    comparisons = {}
    for line in lines:
        comparisons.setdefault(comparison_name(line), []).append(line)
    text = ("# Does Next Patch Prediction hold on the embedded data?\n\n"
            "Made by `python notebooks/evidence.py report` from evidence.jsonl; mean ± standard "
            "deviation over seeds. Cost: forward multiply-adds as the paper counts them, those of "
            f"next-token prediction for all steps = 1. CPU seconds: training alone. FD is {FD}, "
            "not FID; the paper has FIDs on ImageNet: compare orders, not numbers.\n\n")
    for name in sorted(comparisons):
        figure(arms_of(comparisons[name]), os.path.join(folder, f"evidence_{name}.png"))
        text += describe(name, comparisons[name])

    def write(f):
        f.write(text.encode())

    replace_file(os.path.join(folder, "evidence.md"), write)
    print(text)


# -------------------------------------------------------------------------------------------------
# 5. Command line


def parse(argv):
    names = "\n".join(f"    {name:22}{variant.what}" for name, variant in VARIANTS.items())
    parser = Parser("evidence.py", description=f"{__doc__}\nThe runs:\n{names}", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND",
                                     help="COMMAND --help lists its flags")

    def command(function):
        added = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0],
                                    description=inspect.cleandoc(function.__doc__),
                                    allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(function=function)
        added.add_argument("--results", default=os.path.join(HERE, "evidence.jsonl"),
                           help="file that has a line for each run")
        return added

    command(report)
    one = command(run)
    one.add_argument("--only", default="", metavar="RUN,RUN",
                     help="names of the runs to do, with commas; all if left out")
    one.add_argument("--seeds", type=npp.integers, default=(0, 1, 2),
                     help="numbers with commas, each a run of its own")
    one.add_argument("--size", default="tiny", help="size of the model")
    one.add_argument("--steps", type=int, default=1200,
                     help="training steps; runs at equal cost have their share of them")
    one.add_argument("--lr", default="", help="learning rate for 256 images, if not npp.py's")
    one.add_argument("--dropout", default="", help="dropout, if not npp.py's")
    one.add_argument("--images", type=int, default=0,
                     help="train on the first so many images; 0: on all")
    one.add_argument("--samples", type=int, default=5000, help="samples to draw and score")
    one.add_argument("--out", default=os.path.join(ROOT, "out", "evidence"),
                     help="folder of the checkpoints")
    return parser.parse_args(argv)


def main(argv=None):
    """-> exit code: 0, 2 after bad input, 130 after Ctrl-C"""
    try:
        args = parse(argv)
        args.function(args)
    except BadInput as error:
        print("evidence.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evidence.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
