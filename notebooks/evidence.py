"""Does Next Patch Prediction hold on the embedded data? Runs with several seeds, and their report

    python notebooks/evidence.py run --only plain,2-1 --seeds 0            # minutes for each run
    python notebooks/evidence.py run --only constant --lr 4e-3 --data data/faces
    python notebooks/evidence.py report --minus plain                      # or another baseline

A run is npp.py with other flags: train, sample, and score the samples with fid.py. Each adds a line
to evidence.jsonl, and is skipped if its line is there. Stopped at any point, the same command
continues. Processes that run at the same time need different --seeds.

The report pairs differences by seed, which fixes the first weights and the order of the images.
2-1@0.004 is 2-1 with --lr 4e-3. Cost: multiply-adds, next-token prediction for all steps is 1. FD:
Frechet distance in the features of the data set's classifier, computed like FID, but not an FID.
"""

import json
import math
import platform
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import fid  # noqa: E402
import npp  # noqa: E402
from tokenizer import Codes, run_command, run_program  # noqa: E402

RESULTS = ROOT / "notebooks" / "evidence.jsonl"
OUT = ROOT / "out" / "evidence"
VERSION = 2              # of the scores; those of version 1 are of 10,000 samples at guidance 3
SAMPLES = 5000
SWEEP = (1.5, 2.0, 3.0)  # guidance scales; FEW samples of other noise choose the best
FEW = 500

CONSTANT = "--warmup_epochs 0 --decay_frac 0"
RUNS = {
    # LlamaGen's recipe (constant) and NPP (2-1) differ in learning rate schedule and patches. The
    # paper changes both at once, these change one at a time.
    "constant": f"--patches 1 {CONSTANT}",
    "plain": "--patches 1",
    "constant_2-1": f"--patches 2,1 {CONSTANT}",
    "2-1": "--patches 2,1",
    "constant_warmup": "--patches 1 --decay_frac 0",
    "equal_cost": "--patches 1",
    "constant_equal_cost": f"--patches 1 {CONSTANT}",
    # The paper's other schedules of patches, and an earlier switch to p = 1
    "4-1": "--patches 4,1",
    "4-2-1": "--patches 4,2,1",
    "8-4-2-1": "--patches 8,4,2,1",
    "lam_2_3": f"--patches 2,1 --lam {2 / 3}",
    "lam_3_4": "--patches 2,1 --lam 0.75",
    "lam_4_5": "--patches 2,1 --lam 0.8",
    "lam_0.3": "--patches 2,1 --lam 0.3",
    "lam_0.2": "--patches 2,1 --lam 0.2",
}
REMOVED = {  # run at commit 509a3bf, with code of their own; their lines are still reported
    "k_times": "(2,1), K times the images at p = 2",
    "k_times_0.3": "(2,1), lam 0.3, K times the images at p = 2",
    "output_only": "(2,1), patches in the output only",
    "rescaled": "(2,1), embeddings times sqrt(K)",
    "averaged_positions": "(2,1), position of a patch: the mean of its codes'",
    "optimizer_reset": "(2,1), AdamW's moments reset at p = 1",
    "double_rate": "(2,1), twice the learning rate at p = 2",
}


def read_lines():
    """-> a dict for each run. The oldest lines lack what did not vary then."""
    oldest = {"data": "data/fashion", "images": 60_000, "dropout": 0.0, "lr": 0.008, "version": 1}
    with open(RESULTS) as file:
        return [oldest | json.loads(text) for text in file]


def multiply_adds(size, meta, patches=(1,), lam=0.5):
    """Forward multiply-adds per image, as the paper counts them, averaged over the schedule"""
    average, _ = bench.cost(size, patches, lam, meta["vocab"], meta["grid"])
    return average


def draw(folder, guidance, seed, n):
    """n samples, of all classes in turn, from a run's checkpoint -> path of the .npz"""
    path = f"{folder}/samples.npz"
    # How many images share a forward changes the rounding, so it is fixed here.
    npp.main(["--sample", f"{folder}/ckpt.pt", "--out", path, "--n", str(n), "--seed", str(seed),
              "--cfg_scale", str(guidance), "--micro_batch", "500"])
    return path


def score(folder, data, seed):
    """-> FD by guidance scale, and all scores at the best scale"""
    net = fid.load_network(f"{data}/features.pt", "cuda" if torch.cuda.is_available() else "cpu")
    reference = f"{data}/reference.npz"
    real, _ = fid.read_statistics(reference, net)
    sweep = {}
    for guidance in SWEEP:
        _, drawn = fid.extract(net, draw(folder, guidance, seed + 1000, FEW))
        sweep[guidance] = fid.frechet_distance(*drawn[0], *real[0])
    best = min(sweep, key=sweep.get)
    scores = fid.evaluate(net, draw(folder, best, seed, SAMPLES), reference)
    return sweep, scores | {"guidance": best}


def run_one(name, seed, data, size, grid_steps, lr):
    """Train, sample, score and add a line to the results, unless it is there"""
    path = ROOT / data
    meta = Codes(path).meta
    steps = grid_steps
    if name.endswith("equal_cost"):
        steps = round(multiply_adds(size, meta, (2, 1)) / multiply_adds(size, meta) * steps)
    flags = RUNS[name].split() + ["--data", str(path), "--model", size, "--seed", str(seed),
                                  "--steps", str(steps), "--eval_every", str(math.ceil(steps / 6))]
    if lr:
        flags += ["--lr", str(lr)]
    cfg = npp.parse(flags)
    key = dict(run=name, seed=seed, data=data, size=size, grid_steps=grid_steps, batch=cfg.batch,
               images=meta["images"], dropout=cfg.dropout, lr=cfg.lr, version=VERSION)
    if any(key.items() <= line.items() for line in read_lines()):
        return

    folder = OUT / f"{path.name}_{size}_{grid_steps}_{name}_lr_{cfg.lr:g}_seed_{seed}"
    torch.compiler.reset()  # on a GPU, or the graphs of all runs pile up in one process
    npp.main(flags + ["--out", str(folder)])
    with open(f"{folder}/log.jsonl") as file:
        log = [json.loads(text) for text in file]
    validation = [[line["step"], line["val_loss"]] for line in log if "val_loss" in line]
    sweep, best = score(folder, path, seed)
    cost = multiply_adds(size, meta, cfg.patches, cfg.lam) * steps * cfg.batch
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    line = dict(key, patches=cfg.patches, lam=cfg.lam, steps=steps, cost=cost,
                val_loss=validation[-1][1], sweep=sweep, best=best, validation=validation,
                machine=machine, torch=torch.__version__, samples_dtype=cfg.dtype)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


GROUP = ("data", "images", "size", "dropout", "grid_steps", "batch", "version")  # comparable runs
DIGITS = {"loss": 3, "lowest loss": 3, "FD": 2}


def scores_of(line):
    """-> {column: value}"""
    best = line["fixed"] if line["version"] == 1 else line["best"]
    return {"loss": line["val_loss"], "lowest loss": min(loss for _, loss in line["validation"]),
            "FD": best[best.get("features", "FD(fashion-classifier)")]}


def mean_and_deviation(arm, column):
    values = [scores[column] for scores in arm.values()]
    text = f"{np.mean(values):.{DIGITS[column]}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{DIGITS[column]}f}"
    return text


def contrast(arms, weights, column):
    """A weighted sum of arms, seed by seed -> its mean (95 % interval of Student's t), in words

    arms: {name: {seed: scores}}. weights: {"2-1": 1, "plain": -1} is a difference.
    """
    seeds = set.intersection(*[set(arms.get(name, {})) for name in weights])
    n = len(seeds)
    if n < 2:
        return "–"
    sums = [sum(w * arms[name][seed][column] for name, w in weights.items()) for seed in seeds]
    mean = np.mean(sums)
    half = stats.t.ppf(0.975, n - 1) * np.std(sums, ddof=1) / math.sqrt(n)
    digits = DIGITS[column]
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def print_table(head, rows):
    for row in [head, ["---"] * len(head)] + rows:
        print(f"| {' | '.join(row)} |")
    print()


def print_contrasts(title, arms, contrasts):
    rows = []
    for name, weights in contrasts.items():
        rows.append([name] + [contrast(arms, weights, column) for column in DIGITS])
    print_table([title] + list(DIGITS), rows)


def print_group(lines, minus):
    """lines: comparable runs. minus: the arm that is subtracted from all others"""
    usual = npp.parse(["--model", lines[0]["size"]]).lr
    next_token = multiply_adds(lines[0]["size"], Codes(ROOT / lines[0]["data"]).meta)
    arms = {}
    rows = {}
    for line in sorted(lines, key=itemgetter("run", "lr")):
        run = line["run"]
        name = run if line["lr"] == usual else f"{run}@{line['lr']:g}"
        cost = line["cost"] / line["batch"] / line["grid_steps"] / next_token
        rows[name] = [name, (RUNS | REMOVED)[run], f"{cost:.3f}"]
        arms.setdefault(name, {})[line["seed"]] = scores_of(line)
    for name, arm in arms.items():
        rows[name].append(str(len(arm)))
        rows[name] += [mean_and_deviation(arm, column) for column in DIGITS]
    print_table(["run", "what it is", "cost", "seeds"] + list(DIGITS), list(rows.values()))
    pairs = {name: {name: 1, minus: -1} for name in arms if name != minus}
    print_contrasts(f"minus {minus}", arms, pairs)

    # The paper's comparison, taken apart: the first three add up to the last.
    for constant in arms:
        if constant.split("@")[0] == "constant":
            patches = constant.replace("constant", "constant_2-1")
            print_contrasts(f"from {constant} to 2-1", arms, {
                "schedule (plain)": {"plain": 1, constant: -1},
                f"patches ({patches})": {patches: 1, constant: -1},
                "interaction": {"2-1": 1, "plain": -1, patches: -1, constant: 1},
                "total": {"2-1": 1, constant: -1}})


def run(only: str = ",".join(RUNS), seeds: tuple = (0, 1, 2), data: str = "data/fashion",
        size: str = "tiny", steps: int = 1200, lr: float = 0.0):
    """data: folder of codes, relative to the repository. size: of the model. steps: fewer in runs
    at equal cost. lr: for 256 images; 0: npp.py's
    """
    for seed in seeds:
        for name in only.split(","):
            run_one(name, seed, data, size, steps, lr)


def report(minus: str = "2-1"):
    """minus: baseline of the differences"""
    groups = {}
    for line in read_lines():
        title = ", ".join(f"{name} {line[name]}" for name in GROUP)
        groups.setdefault(title, []).append(line)
    for title in sorted(groups):
        print(f"## {title}\n")
        print_group(groups[title], minus)


def main(argv=None):
    return run_command("evidence.py", __doc__, (run, report), argv)


if __name__ == "__main__":
    run_program(main, "evidence.py")
