"""What this code costs on the machine at hand

    python bench.py                                  # every row below, size tiny: minutes on a CPU
    python bench.py --what frechet --rounds 5        # the Frechet distance beside scipy's sqrtm
    python bench.py --size B --batch 256 --vocab 16384 --grid 16 --json     # a GPU's rows, as JSON

    train    a training step at p = 1, 2, 4: forward, backward, clipping, AdamW
    sample   images a second, without and with guidance
    frechet  the distance of two full-rank Gaussians in 2048 dimensions

The calls of a row are interleaved (a, b, c, a, b, c ...) and each line gives the median with the
smallest and the largest of the rounds, and how the median stands to that of the row's first call.
On a GPU training runs compiled under bfloat16 autocast and sampling in bfloat16; on a CPU, float32.
"""
import json
import platform
import statistics
import sys
import time

import numpy as np
import torch
from scipy.linalg import sqrtm

import fid
import npp
from common import BadInput, Machine, Parser, generator, one_line_errors

def interleaved(calls, rounds, machine):
    """{name: function} -> {name: seconds of each round}, after one call of each to warm up"""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if machine.gpu:
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds

def build(args, machine):
    """-> Config, model and optimizer, as npp.py trains them"""
    cfg = npp.Config(model=args.size)
    facts = {"vocab": args.vocab, "grid": args.grid, "classes": range(1000)}
    return cfg, *npp.build(cfg, facts, machine.device)

def train_calls(args, machine):
    cfg, model, optimizer = build(args, machine)
    wrapped = torch.compile(model, dynamic=False) if machine.gpu else model
    batch = (torch.randint(args.vocab, (args.batch, args.grid**2)),
             torch.randint(1000, (args.batch,)))
    return {f"train p={p}": lambda p=p: npp.train_step(wrapped, optimizer, batch, p, cfg, machine)
            for p in (1, 2, 4) if args.grid % p == 0}, args.batch

def sample_calls(args, machine):
    _, model, _ = build(args, machine)
    model.to(torch.bfloat16 if machine.bfloat16 else torch.float32)
    labels = torch.arange(args.batch, device=machine.device) % 1000
    return {f"sample cfg_scale={s:g}": lambda s=s: npp.generate(model, labels, cfg_scale=s)
            for s in (1.0, 2.0)}, args.batch

def frechet_calls(args, machine):
    def gaussian(seed, d=2048):  # with a spectrum that falls, as that of real features
        x = generator(seed).standard_normal((2 * d, d)) * np.arange(1, d + 1) ** -0.5
        return x.mean(0) + seed, np.cov(x, rowvar=False)

    (mu1, cov1), (mu2, cov2) = gaussian(0), gaussian(1)

    def ours():
        return fid.frechet_distance(mu1, cov1, mu2, cov2)

    def scipys():
        root = np.trace(sqrtm(cov1 @ cov2)).real
        return np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2) - 2 * root

    a, b = ours(), scipys()
    print(f"frechet distance: {a:.12g}, scipy {b:.12g}, relative difference {abs(a / b - 1):.1e}")
    return {"frechet": ours, "frechet by scipy": scipys}, 0

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    rows = {"train": train_calls, "sample": sample_calls, "frechet": frechet_calls}
    for name, default, text in (
        ("what", ",".join(rows), "rows, with commas"), ("size", "tiny", "size of the model"),
        ("batch", 64, "images at once"), ("vocab", 256, "codes"), ("grid", 8, "codes a side"),
        ("rounds", 5, "rounds"), ("json", False, "a line of JSON for each call"),
    ):
        parser.add_flag(name, default, text)
    args = parser.parse_args(argv)
    wrong = [x for x in args.what.split(",") if x not in rows]
    if wrong or args.size not in npp.SIZES or args.rounds < 1:
        raise BadInput(f"what {args.what}, size {args.size}, rounds {args.rounds}: expected some "
                       f"of {', '.join(rows)}; one of {', '.join(npp.SIZES)}; 1 or more")
    machine = Machine("auto")
    device = torch.cuda.get_device_name() if machine.gpu else platform.machine() + " CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy "
          f"{np.__version__}, size {args.size}, {args.rounds} rounds")
    for what in args.what.split(","):
        calls, images = rows[what](args, machine)
        first = None
        for name, seconds in interleaved(calls, args.rounds, machine).items():
            median = statistics.median(seconds)
            first = first or median
            if args.json:
                print(json.dumps({"what": name, "seconds": seconds, "ratio": median / first}))
                continue
            rate = f"{images / median:9.1f} images/s" if images else ""
            print(f"{name:20} {median:9.4f} s  ({min(seconds):.4f} to {max(seconds):.4f})  "
                  f"{median / first:6.3f} of the first  {rate}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
