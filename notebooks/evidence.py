"""Does Next Patch Prediction hold on the embedded data? A grid of runs x seeds, and its report

    python notebooks/evidence.py run                  # hours on a CPU; stop and go on at will
    python notebooks/evidence.py run --only plain,2-1 --seeds 3,4
    python notebooks/evidence.py run --size B --steps 14000 --seeds 0,1,2,3,4       # for a GPU
    python notebooks/evidence.py report               # the lines -> evidence.md, evidence_*.png

`run` appends a line of JSON for each finished run to evidence.jsonl and skips those that are there;
started twice at once, it shares the work.
Distances are FD(fashion-classifier), not FID: the features are those of data/fashion/features.pt.
"""

import fcntl
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from scipy import stats

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import fid  # noqa: E402
import npp  # noqa: E402
from common import BadInput, Machine, Parser, one_line_errors, write_atomically  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

DATA = os.path.join(ROOT, "data", "fashion")
FACTS = npp.Codes(DATA).facts  # vocab, grid, classes, tokenizer
FD = "FD(fashion-classifier)"
GUIDANCE = 3.0                 # fixed beforehand; 2 proved better in runs over 1,200 steps
SWEEP = (2.0, 3.0, 4.0)        # of which the best is taken, by FEW samples of other noise
FEW = 500                      # samples for the sweep, and for each point along training

# ---- 1. What the paper leaves open, as replacements of npp.py's functions ----------------------

def rescaled_embeddings():
    """Averages of K independent embeddings are sqrt(K) = p times too small: give it back"""
    average = npp.patchify
    return {"patchify": lambda x, p: average(x, p) * p}

def averaged_positions():
    """A patch stands at the mean position of its codes, in units of codes, not of patches

    Only differences of positions count in attention, so that the first code's position will do."""
    table, grid = npp.rope_2d, FACTS["grid"]

    def rope_2d(h, head_dim, device=None):
        full, p = table(grid, head_dim, device), grid // h                # (1 + grid^2, ..., 2)
        corners = rearrange(full[1:], "(h p1 w p2) f xy -> (p1 p2) (h w) f xy", h=h, p1=p, p2=p)[0]
        return torch.cat([full[:1], corners])                             # (1 + h*h, ..., 2)
    return {"rope_2d": rope_2d}

def optimizer_reset():
    """AdamW forgets its moments where a stage begins"""
    first, stage, train_step = {}, npp.stage, npp.train_step

    def noted(step, *schedule):
        first["now"] = step == stage(step, *schedule)[1]
        return stage(step, *schedule)

    def reset(wrapped, optimizer, *rest):
        if first["now"]:
            optimizer.state.clear()
        return train_step(wrapped, optimizer, *rest)
    return {"stage": noted, "train_step": reset}

def double_rate():
    """Twice the learning rate while p > 1"""
    lr_at = npp.lr_at

    def doubled(step, total, patches, lam, lr, *rest):
        patched = npp.stage(step, total, patches, lam)[0] > 1
        return lr_at(step, total, patches, lam, lr * (1 + patched), *rest)
    return {"lr_at": doubled}

# ---- 2. The grid, most important first ---------------------------------------------------------

@dataclass
class Run:
    what: str                  # as the tables call it
    patches: tuple = (2, 1)
    lam: float = 0.5
    share: float = 1.0         # of the steps
    replaced: object = dict    # () -> {name in npp: function}
    curve: bool = False        # with scores along training

def cost(run, size="tiny"):
    """Multiply-adds an image, averaged over the schedule, as npp.cost counts them"""
    return npp.cost(size, run.patches, run.lam, FACTS["vocab"], FACTS["grid"])[0]

PLAIN = Run("(1,): next token", (1,), curve=True)
NPP = Run("(2,1), lam 1/2: the default", curve=True)
RUNS = {
    "plain": PLAIN, "2-1": NPP,
    "equal_cost": Run("(1,) at the cost of (2,1)", (1,), share=cost(NPP) / cost(PLAIN)),
    "4-1": Run("(4,1)", (4, 1)), "lam_3_4": Run("(2,1), lam 3/4", lam=3 / 4),
    "4-2-1": Run("(4,2,1)", (4, 2, 1)), "lam_2_3": Run("(2,1), lam 2/3", lam=2 / 3),
    "lam_4_5": Run("(2,1), lam 4/5", lam=4 / 5), "8-4-2-1": Run("(8,4,2,1)", (8, 4, 2, 1)),
    "rescaled": Run("(2,1), embeddings x sqrt(K)", replaced=rescaled_embeddings),
    "averaged_positions": Run("(2,1), averaged positions", replaced=averaged_positions),
    "optimizer_reset": Run("(2,1), optimizer reset", replaced=optimizer_reset),
    "double_rate": Run("(2,1), rate x 2 at p = 2", replaced=double_rate),
    **{f"lam_{lam}": Run(f"(2,1), lam {lam}", lam=lam) for lam in (0.3, 0.2)},
}
PAPER = {  # Table 3: FID of sizes B and L on ImageNet; (4,1)'s by the differences in Sec. 4.5
    "plain": (5.46, 3.80), "2-1": (4.47, 2.76), "4-1": (4.92, 2.89), "4-2-1": (4.62, 2.79),
    "8-4-2-1": (4.68, 2.84), "lam_2_3": ("–", 2.79), "lam_3_4": ("–", 2.81), "lam_4_5": ("–", 2.92)}

# ---- 3. One run: train, sample, score ----------------------------------------------------------

@torch.no_grad()
def score(model, n, guidance, seed):
    """-> dict of the scores of n samples, of all classes in turn; of FEW, two scores alone"""
    device, labels = model.output.weight.device, torch.arange(n) % len(FACTS["classes"])
    tokenizer = load_tokenizer(FACTS["tokenizer"], device, FACTS)
    net = fid.load_network(os.path.join(DATA, "features.pt"), device)
    cfg = npp.Config(seed=seed, cfg_scale=guidance, micro_batch=250)
    images = np.concatenate(list(npp.draw(model, tokenizer, labels, cfg)))
    reference = os.path.join(DATA, "reference.npz")
    if n == FEW:               # precision and recall would take longer than the samples
        x, (moments,) = fid.extract(net, images)
        (real, *_), right = fid.open_reference(reference, net)[0], net.logits(x).argmax(1).cpu()
        return {FD: fid.frechet_distance(*moments.statistics(), *real),
                "class_accuracy": (right == labels).double().mean().item()}
    return {"guidance": guidance, **fid.evaluate(net, images, labels.numpy(), reference)}

def clock():
    """Seconds of this process: of its CPU time, and on the wall"""
    return np.array([time.process_time(), time.perf_counter()])

def train(run, seed, steps, size, out):
    """Train with npp.py itself -> seconds (CPU, wall) without evaluations, or None if resumed"""
    aside, seen, validate = np.zeros(2), {}, npp.validate

    def validate_aside(model, *rest):
        began, seen["model"] = clock(), model
        loss = validate(model, *rest)
        aside[:] += clock() - began
        return loss

    def progress(record, *rest):  # in place of npp.py's: every sixth of the run, with scores
        began = clock()
        if "val_loss" in record:
            print("  step {step:,}  p {p}  val {val_loss:.4f}".format(**record), flush=True)
        if "val_loss" in record and run.curve:
            scores = score(seen["model"], FEW, GUIDANCE, seed + 1000)
            with open(os.path.join(out, "curve.jsonl"), "a") as f:
                f.write(json.dumps([record["step"], scores[FD], scores["class_accuracy"]]) + "\n")
        aside[:] += clock() - began

    every = -(-steps // 6)
    flags = dict(data=DATA, out=out, model=size, patches=",".join(map(str, run.patches)),
                 lam=run.lam, steps=steps, seed=seed, eval_every=every, save_every=every)
    replaced = dict(validate=validate_aside, progress=progress,
                    load_tokenizer=lambda *rest: None)  # then npp.py draws no pictures
    fresh, began = not os.path.exists(os.path.join(out, "ckpt.pt")), clock()
    with patch.multiple(npp, **replaced, **run.replaced()):
        if code := npp.main([x for k, v in flags.items() for x in (f"--{k}", str(v))]):
            sys.exit(code)     # npp.py has said why; stopped by a signal, the same command goes on
    return [round(x, 1) for x in clock() - began - aside] if fresh else None

def lines(path):
    """What a .jsonl holds, or nothing"""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(x) for x in f]

def one(key, args, out):
    """-> the line of one run, a dict that begins with its key"""
    run, seed, machine = RUNS[key["run"]], key["seed"], Machine(args.dtype)
    steps, dtype = round(run.share * args.steps), "bfloat16" if machine.bfloat16 else "float32"
    torch.compiler.reset()     # on a GPU, or too many graphs pile up in one process
    seconds = train(run, seed, steps, args.size, out)
    model = npp.load_model(os.path.join(out, "ckpt.pt")).to(machine.device, getattr(torch, dtype))
    sweep = {g: score(model, FEW, g, seed + 1000)[FD] for g in SWEEP}
    best, fixed = min(sweep, key=sweep.get), score(model, args.samples, GUIDANCE, seed)
    log = [x for x in lines(os.path.join(out, "log.jsonl")) if "val_loss" in x]
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        **key, "patches": run.patches, "lam": run.lam, "steps": steps,
        "cost": cost(run, args.size) * steps * key["batch"],              # forward multiply-adds
        "seconds": seconds, "val_loss": log[-1]["val_loss"], "fixed": fixed, "sweep": sweep,
        "best": fixed if best == GUIDANCE else score(model, args.samples, best, seed),
        "validation": [[x["step"], x["val_loss"]] for x in log],
        "curve": sorted({x[0]: x for x in lines(os.path.join(out, "curve.jsonl"))}.values()),
        "machine": torch.cuda.get_device_name() if machine.gpu else cpu,
        "torch": torch.__version__, "samples_dtype": dtype}

def run_grid(args):
    """Do what is not done; a lock on each run's folder, which dies with us, keeps others off it"""
    wanted = args.only.split(",") if args.only else list(RUNS)
    if (not {*wanted} <= {*RUNS} or args.size not in npp.SIZES or min(args.seeds) < 0
            or args.steps < 6 or args.samples <= FEW):
        raise BadInput(f"only {args.only}, size {args.size}, seeds {args.seeds}, steps {args.steps}"
                       f", samples {args.samples}: expected some of {', '.join(RUNS)}; one of "
                       f"{', '.join(npp.SIZES)}; 0 or more; 6 or more; over {FEW}")
    fid.LEADER, batch = False, npp.parse(["--model", args.size]).batch    # no progress lines
    for seed, name in product(args.seeds, wanted):
        key = dict(run=name, seed=seed, size=args.size, grid_steps=args.steps, batch=batch)
        out = os.path.join(ROOT, "out", "evidence", f"{args.size}_{args.steps}", f"{name}_s{seed}")
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if any(key.items() <= x.items() for x in lines(args.results)):
                continue
            print(f"{name}, seed {seed}, from {time.strftime('%H:%M:%S')}", flush=True)
            line = one(key, args, out)
            with open(args.results, "ab", buffering=0) as f:              # one write: never mixed
                f.write(json.dumps(line).encode() + b"\n")
            print(f"  {FD} {line['fixed'][FD]:.4f}", flush=True)
    return 0

# ---- 4. The report -----------------------------------------------------------------------------

SCORES = {  # column of the table: (how to find it in a line, digits)
    "CPU s": (lambda x: x["seconds"][0] if x["seconds"] else None, 0),
    "val. loss": (lambda x: x["val_loss"], 4), "FD fixed": (lambda x: x["fixed"][FD], 3),
    "FD best": (lambda x: x["best"][FD], 3), "KID x 1000": (lambda x: 1e3 * x["fixed"]["KID"], 1),
    **{k: (lambda x, k=k: x["fixed"][k], 3) for k in ("precision", "recall", "class_accuracy")}}
COLORS = {"plain": "tab:blue", "2-1": "tab:orange", "equal_cost": "tab:green"}

def values(found, name, column):
    """-> {seed: value} of one column of one run, without those that have none"""
    some = sorted((x["seed"], SCORES[column][0](x)) for x in found if x["run"] == name)
    return {seed: value for seed, value in some if value is not None}

def spent(name, size, steps, until=math.inf):
    """Multiply-adds of a run of `steps` until one of them, in those of a step at p = 1"""
    return sum(max(0, min(until, end) - first) * cost(Run("", (p,)), size) / cost(PLAIN, size)
               for p, first, end in npp.spans(steps, RUNS[name].patches, RUNS[name].lam))

def share(x):
    """Multiply-adds of the whole run of a line, those of the plain one = 1"""
    return spent(x["run"], x["size"], x["steps"]) / x["grid_steps"]

def spread(x, digits):
    """Values -> their mean, and standard deviation where there are two, in words"""
    return " ± ".join(f"{f(x):.{digits}f}" for f in (np.mean, partial(np.std, ddof=1))[:len(x)])

def versus(a, b, digits):
    """{seed: value} of two runs -> mean of a - b and a paired t-test over common seeds, in words:
    the same seed means the same first weights and batches"""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return "–"
    x, y = (np.array([v[s] for s in seeds]) for v in (a, b))
    p = stats.ttest_rel(x, y).pvalue
    word = ("lower" if x.mean() < y.mean() else "higher") if p < 0.05 else "not separated"
    chance = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{(x - y).mean():+.{digits}f}, {chance}, {word}"

def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |"
                     for row in (head, ["---"] * len(head), *rows)) + "\n"

def describe(found, size, steps, batch):
    """-> the report on one grid, markdown"""
    by_name = {name: some for name in RUNS if (some := [x for x in found if x["run"] == name])}
    runs = [[RUNS[name].what, len(some), f"{share(some[0]):.3f}",
             *(spread([*values(found, name, c).values()], SCORES[c][1]) for c in SCORES),
             *PAPER.get(name, "––")] for name, some in by_name.items()]
    pairs = [("2-1", "plain"), ("2-1", "equal_cost"), ("equal_cost", "plain")]
    pairs += [(name, "2-1") for name in by_name if name not in ("2-1", "plain", "equal_cost")]
    pairs += [("averaged_positions", name) for name in ("equal_cost", "plain")]
    columns = "val. loss", "FD fixed", "FD best"
    differences = [[f"{RUNS[a].what} – {RUNS[b].what}", *(
        versus(values(found, a, c), values(found, b, c), SCORES[c][1]) for c in columns)]
        for a, b in pairs if {a, b} <= by_name.keys()]
    ends = [[loss for _, loss in x["validation"][-4:]] for x in by_name.get("plain", [])]
    falls = ", ".join(f"{x:+.3f}" for x in np.diff(ends).mean(0)) if ends else "unknown"
    one, fixed = found[0], found[0]["fixed"]
    return f"""## Size {size}, {steps:,} steps of {batch} images: {len(found)} runs

{one["machine"]}, torch {one["torch"]}; {fixed["n"]:,} samples a score, in {one["samples_dtype"]}.
Fixed: guidance {fixed["guidance"]:g}. Best: of {", ".join(one["sweep"])}, chosen by {FEW} samples
of other noise. As many real images as samples get FD {fixed["real_against_real"]:.4f}.

{table(["run", "seeds", "cost", *SCORES, "paper: FID, B", "L"], runs)}
Differences over common seeds, by a paired t-test (no correction for their number):

{table(["difference", *columns], differences)}
How far from flat (1,) is: change of its validation loss in each of the last three sixths, in nats a
code: {falls} (the learning rate decays in the last fifth).

![scores against cost](evidence_{size}_{steps}_{batch}.png)

"""

def figure(found, size, path):
    """Scores along training, and of all runs at the end, against cost"""
    from matplotlib.figure import Figure  # of the extra `notebooks`, which runs do without
    fig = Figure((10, 7), layout="constrained")
    axes = fig.subplots(2, 2).flatten()
    for axis, key, i, scale, label in (
        (axes[0], "validation", 1, "linear", "validation loss at p = 1, nats a code"),
        (axes[1], "curve", 1, "log", f"{FD}, {FEW} samples"),
        (axes[2], "curve", 2, "linear", f"class accuracy, {FEW} samples"),
    ):
        for x in (x for x in found if x["run"] in COLORS):
            axis.plot([spent(x["run"], size, x["steps"], y[0]) for y in x[key]],
                      [y[i] for y in x[key]], ".-", color=COLORS[x["run"]])
        axis.set(xlabel="cost so far, in steps at p = 1", ylabel=label, yscale=scale)
    names = [name for name in RUNS if name in {x["run"] for x in found}]
    for row, name in enumerate(names):
        y = [*values(found, name, "FD fixed").values()]
        axes[3].errorbar(np.mean(y), row, xerr=np.std(y, ddof=len(y) > 1), fmt="o", capsize=3,
                         color=COLORS.get(name, "gray"))
        axes[3].annotate(RUNS[name].what, (np.mean(y), row), (0, 4), textcoords="offset points",
                         ha="center", size=8)
    axes[3].set(xlabel=f"{FD} at the end, mean ± sd", yticks=[], ylim=(len(names) - 0.5, -0.9))
    axes[3].margins(x=0.15)
    axes[3].grid(axis="x", alpha=0.4)
    write_atomically(path, lambda f: fig.savefig(f, format="png", dpi=110))

def report(args):
    """Write evidence.md, and a figure for each grid, beside the lines"""
    found, folder = lines(args.results), os.path.dirname(os.path.abspath(args.results))
    if not found:
        raise BadInput(f"{args.results}: missing or empty, expected the lines of `run`")
    text = f"""# Does Next Patch Prediction hold on the embedded data?

Made by `python notebooks/evidence.py report` from evidence.jsonl; mean ± standard deviation over
seeds. cost: multiply-adds, those of (1,) = 1. CPU s: training alone, runs never interrupted. FD is
{FD}, not FID; the paper has FIDs on ImageNet: compare orders, not numbers.

"""
    for key in sorted({(x["size"], x["grid_steps"], x["batch"]) for x in found}):
        some = [x for x in found if (x["size"], x["grid_steps"], x["batch"]) == key]
        figure(some, key[0], os.path.join(folder, "evidence_{}_{}_{}.png".format(*key)))
        text += describe(some, *key)
    write_atomically(os.path.join(folder, "evidence.md"), lambda f: f.write(text.encode()))
    print(text)
    return 0

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("run", "report"))
    for name, default, text in (
        ("only", "", f"runs, with commas ({', '.join(RUNS)})"), ("seeds", (0, 1, 2), "seeds"),
        ("size", "tiny", "size of the model"), ("steps", 1200, "steps of a run with share 1"),
        ("samples", 10000, "samples to score"), ("dtype", "auto", "of samples, as npp.py's"),
        ("results", os.path.join(HERE, "evidence.jsonl"), "file of lines"),
    ):
        parser.add_flag(name, default, text)
    args = parser.parse_args(argv)
    return (run_grid if args.command == "run" else report)(args)

if __name__ == "__main__":
    sys.exit(main())
