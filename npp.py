"""Next Patch Prediction (Pang et al., arXiv 2412.15321): a transformer that draws, in one file

An image is a grid of N codes from a VQ tokenizer, and a transformer predicts them one by one. NPP
only changes how it is trained: first on patches, p x p codes whose embeddings are averaged into one
(a sequence K = p * p times shorter) and of which every code is a target; then, with the same
weights, on single codes. Sampling stays plain next-token prediction. --patches 1 is LlamaGen.

    python npp.py                                      # minutes on a CPU, ends with pictures
    torchrun --nproc_per_node=8 npp.py --model B --data codes/imagenet256          # the paper
    python npp.py --model XXL --patches 8,4,2,1 --plan --data none    # what a schedule would cost
    python npp.py --sample out/tiny/ckpt.pt --classes Sandal,Bag --out bags.png
    torchrun --nproc_per_node=8 -- npp.py --sample W.pt --tokenizer VQ.pt --n 50000 --out b.npz

Shapes: B images of N = h * w codes, patches of K = p * p codes, D width, V vocabulary.
"""

import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch.utils.checkpoint import checkpoint

import fid
from common import (BadInput, Codes, Machine, Parser, brief, check_ranges, class_numbers, clock,
                    cut_log, generator, load_file, one_line_errors, save_npz, save_rows, status,
                    stop_signals, to_uint8, watched, write_atomically)
from tokenizer import load_tokenizer

SIZES = {
    "tiny": dict(n_layer=4, n_head=4, dim=128),
    "B": dict(n_layer=12, n_head=12, dim=768),     # parameters, with 16,384 codes: 111 million
    "L": dict(n_layer=24, n_head=16, dim=1024),    # 343
    "XL": dict(n_layer=36, n_head=20, dim=1280),   # 775
    "XXL": dict(n_layer=48, n_head=24, dim=1536),  # 1411
    "3B": dict(n_layer=24, n_head=32, dim=3200),   # 3097
}

@dataclass
class Config:
    """Every field is a flag and its comment the flag's help. Defaults are the paper's, see TINY."""
    data: str = "data/fashion"   # folder of codes; none: ImageNet's shape, for --plan and --sample
    out: str = ""                # folder of the run (out/MODEL); with --sample a .png or .npz
    init: str = ""               # checkpoint whose weights to start from
    model: str = "tiny"          # size: tiny, B, L, XL, XXL or 3B
    patches: tuple = (2, 1)      # patch edge p of each stage; 4,2,1 adds a level
    lam: float = 0.5             # stage i of L ends at the fraction lam^(L-1-i) of all steps
    epochs: float = 300.0        # passes over the images
    steps: int = 0               # total steps, instead of epochs
    batch: int = 256             # images a step, over all ranks
    lr: float = 1e-4             # learning rate per 256 images: lr * batch / 256 is used
    lr_min: float = 1e-5         # where each stage's decay ends, absolute
    warmup_epochs: float = 1.0   # warm-up of each stage, at most a tenth of it
    decay_frac: float = 0.2      # last part of each stage, in which the rate decays
    weight_decay: float = 0.05   # on tensors of two or more dimensions
    clip: float = 1.0            # largest gradient norm
    dropout: float = 0.1         # on token embeddings, attention and feed-forward outputs
    class_dropout: float = 0.1   # share of labels replaced by the null label, for guidance
    seed: int = 0                # of weights, batches, dropout and samples
    micro_batch: int = 0         # images a rank takes at once; 0: its share of a batch, 25 samples
    recompute: bool = False      # activation checkpointing: less memory, a third more time
    compile: str = "auto"        # true, false, or auto: training on a GPU
    dtype: str = "auto"          # float32, bfloat16, or auto: bfloat16 on a GPU
    log_every: int = 100         # steps between lines of log.jsonl
    eval_every: int = 2000       # steps between validation losses
    save_every: int = 2000       # steps between checkpoints
    plan: bool = False           # instead of training, print what it would cost
    tflops: float = 400.0        # TFLOP/s that --plan reckons with
    sample: str = ""             # instead of training, draw samples from this checkpoint
    classes: str = ""            # to draw: names or numbers with commas, or random (all in turn)
    n: int = 0                   # number of samples (10 a class)
    cfg_scale: float = 2.0       # guidance scale; 1: none
    temperature: float = 1.0     # divides the logits
    top_k: int = 0               # keep the k likeliest codes; 0: all
    top_p: float = 1.0           # keep the likeliest codes up to this probability
    tokenizer: str = ""          # file that turns codes into images (the data's own)
    image_size: int = 0          # pixels a side, where neither data nor checkpoint say (256)
    image_size_eval: int = 0     # pixels a side of samples, resized as LlamaGen's of 384 are

NAMES = [f.name for f in fields(Config)]
RECIPE = NAMES[NAMES.index("model") : NAMES.index("micro_batch")]  # what decides the result
RANGES = {
    "0 or more": "steps n micro_batch image_size image_size_eval seed top_k temperature lr lr_min "
                 "weight_decay warmup_epochs",
    "1 or more": "batch log_every eval_every save_every", "0 to 1": "dropout class_dropout "
    "decay_frac", "more than 0": "epochs clip top_p tflops", ", ".join(SIZES): "model",
    "auto, true, false": "compile", "auto, float32, bfloat16": "dtype"}
TINY = dict(steps=1200, batch=64, lr=8e-3, dropout=0, log_every=25, eval_every=200, save_every=200)

# ---- 1. Next patch prediction ------------------------------------------------------------------

def patchify(x, p):
    """Average the embeddings in each p x p block (Eq. 2): (B, N, D) -> (B, N/K, D)"""
    h = math.isqrt(x.shape[1]) // p
    return reduce(x, "b (h p1 w p2) d -> b (h w) d", "mean", h=h, p1=p, p2=p)

def patch_targets(codes, p):
    """The K codes of each p x p block: (B, N) -> (B, N/K, K)"""
    h = math.isqrt(codes.shape[1]) // p
    return rearrange(codes, "b (h p1 w p2) -> b (h w) (p1 p2)", h=h, p1=p, p2=p)

def npp_loss(logits, targets):
    """Patch cross-entropy (Eq. 3): logits (B, N/K, V), targets (B, N/K, K) -> nats a code

    The K codes of a patch share one distribution and its normaliser: no logits are repeated."""
    return -logits.log_softmax(-1).gather(-1, targets).mean()             # of (B, N/K, K)

def spans(total, patches, lam):
    """-> [(p, first, end)]: stage i of L ends at round(total * lam^(L-1-i)) (Sec. 3.2)"""
    ends = [0, *(round(total * lam ** (len(patches) - 1 - i)) for i in range(len(patches)))]
    return list(zip(patches, ends, ends[1:]))

def stage(step, total, patches, lam):
    """-> (p, first, end): the patch edge at a step below total, in its stage first <= step < end"""
    return next(span for span in spans(total, patches, lam) if step < span[2])

def lr_at(step, total, patches, lam, lr, lr_min, warmup, decay_frac):
    """The learning rate at `step`, in each stage afresh (Sec. 4.1): warm-up of `warmup` steps,
    at most a tenth of the stage; plateau at lr; linear decay to lr_min in its last decay_frac."""
    _, first, end = stage(step, total, patches, lam)
    warmup = max(1, min(warmup, (end - first) / 10))
    decay = max(1, decay_frac * (end - first))
    rise = min(1, (step - first + 1) / warmup)
    left = min(1, (end - step) / decay)
    return rise * (lr_min + (lr - lr_min) * left)

# ---- 2. Where a patch stands: rotary positions in two dimensions -------------------------------

def rope_2d(h, head_dim, device=None):
    """Angles of a coarse h x h grid, class position first -> cos, sin (1 + h*h, head_dim/2, 2)

    The first half of the head turns with the row, the second with the column. A patch has its own
    integer row and column, whatever p is. The class position has cos = sin = 0, so that its q and k
    vanish: all attend to it with score 0. An accident of LlamaGen's table that its weights need."""
    frequency = 10000 ** -(torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))
    angle = torch.arange(h, device=device)[:, None] * frequency           # (h, head_dim/4)
    angle = torch.cat([repeat(angle, "row f -> (row h) f", h=h),
                       repeat(angle, "column f -> (h column) f", h=h)], dim=1)  # (h*h, head_dim/2)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])

def rotate(x, rope):
    """Turn pairs (2j, 2j+1) of x (B, H, S, head_dim) by the angles of rope (S, head_dim/2, 2)"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                    # (B, H, S, head_dim/2)
    cos, sin = rope.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)

# ---- 3. The transformer: a Llama, with the names of the published checkpoints ------------------

class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None, position=None, seen=None):
        """x (B, S, D) -> same; with a cache of k and v (B, H, N, head_dim), x is the one at
        `position` (1,) and attends to those of the first positions that are `seen` (1, filled)"""
        q, k, v = rearrange(self.wqkv(x), "b s (qkv h d) -> qkv b h s d", qkv=3, h=self.n_head)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (old.index_copy_(2, position, new)[:, :, : seen.shape[1]]
                    for old, new in zip(cache, (k, v)))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.dropout(self.wo(rearrange(y, "b h s d -> b s (h d)")))

class FeedForward(nn.Module):
    """SwiGLU, 2/3 of 4 D wide, rounded up to a multiple of 256"""
    def __init__(self, dim, dropout):
        super().__init__()
        hidden = ffn_width(dim)
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))

def ffn_width(dim):
    return 256 * math.ceil(int(8 * dim / 3) / 256)

class Block(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, n_head, dropout)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(self, x, rope, *past):
        x = x + self.attention(self.attention_norm(x), rope, *past)
        return x + self.feed_forward(self.ffn_norm(x))

class Transformer(nn.Module):
    """model(codes, labels, p) -> logits. Label `classes` is the null label, for guidance."""
    def __init__(self, n_layer, n_head, dim, vocab, classes, grid, dropout=0.0):
        super().__init__()
        self.n_head, self.head_dim, self.classes, self.grid = n_head, dim // n_head, classes, grid
        self.recompute = False  # activations in the backward pass, instead of keeping them
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # so that the first loss is ln V

    def size(self):
        return sum(w.numel() for w in self.parameters())

    def embed_class(self, labels):
        return self.cls_embedding["embedding_table"](labels)[:, None]     # (B, 1, D)

    def run(self, x, rope, cache=None, *past):
        """Embeddings (B, S, D) -> float32 logits (B, S, V)"""
        x = self.tok_dropout(x)
        for i, layer in enumerate(self.layers):
            if self.recompute and self.training:
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, None if cache is None else cache[i], *past)
        return self.output(self.norm(x)).float()

    def forward(self, codes, labels, p=1, loss=False):
        """codes (B, N), labels (B,) -> float32 logits (B, N/K, V), or their loss

        Position i predicts patch i: the class stands in front, the last patch is left out."""
        x = patchify(self.tok_embeddings(codes), p)                       # (B, N/K, D)
        x = torch.cat([self.embed_class(labels), x[:, :-1]], dim=1)       # (B, N/K, D)
        rope = rope_2d(self.grid // p, self.head_dim, x.device)[: x.shape[1]]
        logits = self.run(x, rope)
        return npp_loss(logits, patch_targets(codes, p)) if loss else logits

    def loss(self, codes, labels, p=1):
        """codes (B, N), labels (B,) -> scalar: what training minimises"""
        return self(codes, labels, p, loss=True)

def load_model(path, n_head=None, grid=None):
    """A Transformer in eval mode from a checkpoint of ours, or a published one of LlamaGen or NPP:
    those tell neither heads nor grid, so a head is 64 wide (3B: 100) and the grid 16 codes a side,
    unless given. The model's `facts` are what is known of its data. Raises BadInput."""
    saved = load_file(path)
    try:
        state = next((saved[k] for k in ("model", "module", "state_dict") if k in saved), saved)
        vocab, dim = state["tok_embeddings.weight"].shape
        classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        n_layer = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers."))
        own = SIZES.get(saved.get("config", {}).get("model"), {})
        n_head = n_head or own.get("n_head") or dim // (100 if dim == 3200 else 64)
        with torch.device("meta"):  # the weights come from the file, none are drawn
            model = Transformer(n_layer, n_head, dim, vocab, classes, grid or saved.get("grid", 16))
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as e:
        raise BadInput(f"{path}: expected a transformer of LlamaGen or NPP ({brief(e)})") from None
    names = saved.get("classes", [str(i) for i in range(classes)])
    model.facts = {"vocab": vocab, "classes": names,
                   **{k: saved.get(k) for k in ("grid", "tokenizer", "tokenizer_sha256")}}
    return model.float().eval()

# ---- 4. Sampling -------------------------------------------------------------------------------

def choose(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, ..., V), uniforms u (B, ...) in [0, 1) -> codes (B, ...), by the inverse CDF"""
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, where = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)     # mass of likelier codes
        logits = ordered.masked_fill(before > top_p, -math.inf).gather(-1, where.argsort(-1))
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # so that no u hits probability 0
    u = u.double()[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)

@torch.no_grad()
def generate(model, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, noise=None,
             compile=False, p=1):
    """Draw codes, one position after the other: labels (B,) -> codes (B, N)

    Guidance: logits u + cfg_scale * (c - u), without and with class. `noise`: uniforms (B, N) that
    decide. p > 1 shows what a patch stage learns: patches from one distribution each."""
    training, device, guided = model.training, labels.device, cfg_scale != 1
    model.eval()
    noise = torch.rand(len(labels), model.grid**2, device=device) if noise is None else noise
    noise = patch_targets(noise, p)                                       # (B, N/K, K)
    n, rope = noise.shape[1], rope_2d(model.grid // p, model.head_dim, device)
    codes = torch.zeros_like(noise, dtype=torch.long)
    labels = torch.cat([labels] + [torch.full_like(labels, model.classes)] * guided)  # both at once
    x, position = model.embed_class(labels), torch.zeros(1, dtype=torch.long, device=device)
    cache = [[x.new_zeros(len(x), model.n_head, n, model.head_dim) for _ in "kv"]
             for _ in model.layers]  # apart: of one tensor a compiled step copies all in each layer
    run = torch.compile(model.run, dynamic=False) if compile else model.run

    def step(filled):  # all in place and on the device, so that a CUDA graph can repeat it
        seen = torch.arange(filled, device=device)[None] <= position      # (1, filled)
        logits = run(x, rope[position], cache, position, seen)            # (B or 2B, 1, V)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)                 # (B, 1, V)
        u = noise.index_select(1, position)[:, 0]                         # (B, K)
        new = choose(logits.expand(-1, p * p, -1), u, temperature, top_k, top_p)
        codes.index_copy_(1, position, new[:, None])
        new = model.tok_embeddings(new).mean(1, keepdim=True)             # (B, 1, D), Eq. 2 again
        x.copy_(new.repeat(1 + guided, 1, 1))
        position.add_(1)

    stride = -(-n // 4) if compile else 1  # a compiled step has one shape: make it four of them
    for first in range(0, n, stride):
        left = range(first, min(first + stride, n))
        again = partial(step, left.stop)
        again()
        if compile and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again()                                                   # recorded, not run
            again = graph.replay
        for _ in left[1:]:
            again()
    model.train(training)
    return rearrange(codes, "b (h w) (p1 p2) -> b (h p1 w p2)", h=model.grid // p, p1=p)

def noise_of(seed, indices, length):
    """The uniforms of images `indices`, (len(indices), length): image i is the same in any batch"""
    return torch.stack([torch.from_numpy(generator(seed, 3, int(i)).random(length, np.float32))
                        for i in indices])

# ---- 5. Data: batches that are a pure function of (seed, step) ---------------------------------

def batch_at(data, step, cfg, rows=slice(None)):
    """`rows` of the global batch of a step -> codes (b, N), labels (b,), int64

    A new order each epoch, any view of an image, and the null label in place of some labels."""
    n, where = len(data.codes), np.arange(step * cfg.batch, (step + 1) * cfg.batch)
    index = np.array([permutation(n, cfg.seed, i // n)[i % n] for i in where])
    rng = generator(cfg.seed, 1, step)
    view = rng.integers(data.codes.shape[1], size=cfg.batch)
    null = rng.random(cfg.batch) < cfg.class_dropout
    labels = np.where(null, len(data.facts["classes"]), data.labels[index])
    pair = data.codes[index[rows], view[rows]], labels[rows]
    return [torch.from_numpy(x).long() for x in pair]

@lru_cache(maxsize=2)  # a batch may straddle two epochs
def permutation(n, seed, epoch):
    return generator(seed, 0, epoch).permutation(n)

# ---- 6. Training -------------------------------------------------------------------------------

def check(cfg, facts, world=1):
    """-> cfg with out and steps filled in; BadInput where it contradicts itself, data or ranks"""
    cfg = replace(cfg, out=cfg.out or f"out/{cfg.model}",
                  steps=cfg.steps or round(cfg.epochs * facts["images"] / max(1, cfg.batch)))
    falling = all(a > b for a, b in zip(cfg.patches, cfg.patches[1:])) and cfg.patches[-1] == 1
    grid, micro = facts["grid"], cfg.micro_batch or max(1, cfg.batch // world)
    for right, name, expected in (
        (grid > 0, "image_size", "16 or more"),
        (falling, "patches", "edges that decrease to 1"),
        (falling and all(grid % p == 0 for p in cfg.patches), "patches", f"divisors of {grid}"),
        (0 < cfg.lam < 1, "lam", "more than 0 and less than 1"),
        (cfg.steps > 0, "steps", "at least 1"),
        (cfg.plan or cfg.data != "none", "data", "a folder of codes to train on"),
        (micro > 0 and cfg.batch > 0 and cfg.batch % (world * micro) == 0, "batch",
         f"a multiple of {world} ranks x micro_batch {micro}"),
    ):
        if not right:
            raise BadInput(f"{name} is {getattr(cfg, name)}, expected {expected}")
    return cfg

def build(cfg, facts, device):
    """The model, from cfg.seed or cfg.init, and its AdamW, which decays matrices and embeddings"""
    torch.manual_seed(cfg.seed)
    model = Transformer(**SIZES[cfg.model], vocab=facts["vocab"], classes=len(facts["classes"]),
                        grid=facts["grid"], dropout=cfg.dropout)
    if cfg.init and not os.path.exists(os.path.join(cfg.out, "ckpt.pt")):
        weights, table = load_model(cfg.init).state_dict(), "cls_embedding.embedding_table.weight"
        if len(weights[table]) != model.classes + 1:
            weights[table] = model.state_dict()[table]                    # other classes: afresh
        try:
            model.load_state_dict(weights)
        except RuntimeError as e:
            raise BadInput(f"{cfg.init}: not weights of this size ({brief(e)})") from None
    model.recompute = cfg.recompute
    model.to(device).train()
    groups = [dict(params=[w for w in model.parameters() if (w.dim() >= 2) == matrix],
                   weight_decay=cfg.weight_decay * matrix) for matrix in (True, False)]
    return model, torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)

def resume(cfg, facts, model, optimizer):
    """Load out/ckpt.pt, if there is one -> its step; BadInput if it is of another run"""
    path = os.path.join(cfg.out, "ckpt.pt")
    if not os.path.exists(path):
        return 0
    saved = load_file(path)
    if not isinstance(saved, dict) or not isinstance(config := saved.get("config"), dict):
        raise BadInput(f"{path}: expected a checkpoint of npp.py")
    pairs = [(k, config.get(k), getattr(cfg, k)) for k in RECIPE]
    pairs += [(k, saved.get(k), facts[k]) for k in facts if k != "tokenizer"]  # whose file may move
    pairs += [("init", bool(config.get("init")), bool(cfg.init))]              # and so may this
    differ = "; ".join(f"{k} is {a} there, {b} here" for k, a, b in pairs if a != b)
    if differ:
        raise BadInput(f"{cfg.out} holds another run, choose another --out ({differ})")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]

@torch.no_grad()
def validate(model, val, machine):
    """Mean loss at p = 1 over codes, labels = val"""
    model.eval()
    total = 0.0
    for batch in zip(*(x.to(machine.device).split(64) for x in val)):
        with machine.autocast:
            total += model.loss(*batch).item() * len(batch[0])
    model.train()
    return total / len(val[0])

def train_step(wrapped, optimizer, batch, p, cfg, machine):
    """One step on this rank's share of a batch -> its mean loss, a tensor that nobody waited for"""
    batch = [x.to(machine.device, non_blocking=True) for x in batch]
    pieces, total = list(zip(*(x.split(cfg.micro_batch or len(x)) for x in batch))), 0.0
    for i, piece in enumerate(pieces):
        apart = machine.world > 1 and i + 1 < len(pieces)                 # ranks meet once a step
        with wrapped.no_sync() if apart else nullcontext(), machine.autocast:
            loss = wrapped(*piece, p, loss=True) / len(pieces)
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(wrapped.parameters(), cfg.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total + 0 * norm                                               # NaN if the gradient is

def train(cfg):
    """Train, or go on training, the run in cfg.out; returns the exit code"""
    machine, data = Machine(cfg.dtype), Codes(cfg.data)
    facts, cfg = data.facts, check(cfg, data.facts, machine.world)
    schedule, path = (cfg.steps, cfg.patches, cfg.lam), partial(os.path.join, cfg.out)
    leader, classes = machine.rank == 0, class_numbers(cfg.classes, facts["classes"])
    say = print if leader else (lambda _: None)
    facts["tokenizer"] = cfg.tokenizer or facts["tokenizer"]
    tokenizer = facts["tokenizer"] and load_tokenizer(facts["tokenizer"], machine.device, facts)
    model, optimizer = build(cfg, facts, machine.device)
    first = resume(cfg, facts, model, optimizer)
    if first == cfg.steps:
        say(f"{cfg.out} is finished after {first:,} steps")
    compiled = cfg.compile == "true" or cfg.compile == "auto" and machine.gpu
    wrapped = torch.compile(model, dynamic=False) if compiled else model  # one graph for each p
    if machine.world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    rows = slice(*(cfg.batch // machine.world * r for r in (machine.rank, machine.rank + 1)))

    def save(name, step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                 "config": asdict(cfg), **facts}
        write_atomically(path(name), lambda f: torch.save(state, f))

    def fetch(step):  # pinned, so that the copy to the GPU makes nobody wait
        return [x.pin_memory() if machine.gpu else x for x in batch_at(data, step, cfg, rows)]

    if leader:
        cut_log(path("log.jsonl"), first)
        if first == 0:
            save("ckpt.pt", 0)                                            # the folder is taken
    say(f"{cfg.model}, {model.size():,} parameters; {facts['images']:,} images; "
        f"steps {first:,} to {cfg.steps:,}; in {cfg.out}")

    losses, began, tick = [], time.time(), time.time()
    with ThreadPoolExecutor(1) as pool, stop_signals() as stop:
        upcoming = pool.submit(fetch, first)
        for step in range(first, cfg.steps):
            p, _, end = stage(step, *schedule)
            lr = lr_at(step, *schedule, cfg.lr * cfg.batch / 256, cfg.lr_min,
                       cfg.warmup_epochs * facts["images"] / cfg.batch, cfg.decay_frac)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch, upcoming = upcoming.result(), pool.submit(fetch, step + 1)
            torch.manual_seed(generator(cfg.seed, 2, step, machine.rank).integers(2**62))  # dropout
            losses.append(train_step(wrapped, optimizer, batch, p, cfg, machine))

            done = step + 1
            stopped = machine.mean(torch.tensor(float(len(stop)))) > 0    # one rank stops all
            keep = stopped or done == end or done % cfg.save_every == 0
            evaluate = done == end or done % cfg.eval_every == 0
            if keep or evaluate or done % cfg.log_every == 0:             # then a line of the log
                loss = machine.mean(torch.stack(losses).mean()).item()
                if not math.isfinite(loss):
                    raise BadInput(f"the loss is {loss} at step {done}, expected a number: try a "
                                   f"lower --lr; {path('ckpt.pt')} is from before")
                speed = len(losses) * cfg.batch / (time.time() - tick)
                record = {"step": done, "p": p, "loss": loss, "lr": lr, "img_s": round(speed, 1)}
                if evaluate and data.val:
                    record["val_loss"] = validate(model, data.val, machine)
                if leader:
                    with open(path("log.jsonl"), "a") as f:
                        f.write(json.dumps(record) + "\n")
                    progress(record, cfg, first, began)
                losses = []
            if leader and done == end:
                pictures = [(f"samples_p{p}", 5)] + [("samples", 10)] * (done == cfg.steps)
                for name, each in pictures if tokenizer else []:
                    images = draw(model, tokenizer, classes.repeat(each), cfg, p)
                    save_rows(path(f"{name}.png"), images, len(classes))
                save(f"ckpt_p{p}.pt", done)
            if leader and keep:
                save("ckpt.pt", done)                                     # last: it vouches for all
            tick = tick if losses else time.time()                        # without all of that
            if stopped:
                machine.wait()  # torchrun kills a leader that still saves, once another has ended
                say(f"\nstopped after step {done:,}: the same command goes on from there")
                return 130
    if tokenizer:
        if os.path.exists(os.path.join(cfg.data, "features.pt")):         # ranks share the features
            labels = torch.arange(1000) % len(facts["classes"])
            images = np.concatenate(list(draw(model, tokenizer, labels, cfg)))
            say("\n1,000 samples: " + fid.small_report(images, labels.numpy(), cfg.data))
        say(f"\nsee {path('samples.png')}, a class a row, and {path('samples_p*.png')}, by stage\n"
            f"try python npp.py --sample {path('ckpt.pt')} --cfg_scale 4 --out strong.png")
    return 0

def progress(record, cfg, first, began):
    """Show where the run is, in work done: a step at p costs about 1/p^2 of one at p = 1"""
    before, now, total = (sum(max(0, min(step, end) - start) / p**2
                              for p, start, end in spans(cfg.steps, cfg.patches, cfg.lam))
                          for step in (first, record["step"], cfg.steps))
    left = clock((time.time() - began) * (total - now) / (now - before))
    val = f"  val {record['val_loss']:.3f}" if "val_loss" in record else ""
    status(f"{now / total:4.0%}  step {record['step']:,}  p {record['p']}  "
           f"loss {record['loss']:.3f}{val}  {record['img_s']:,.0f} img/s  {left} left")

# ---- 7. Pictures from a checkpoint -------------------------------------------------------------

def draw(model, tokenizer, labels, cfg, p=1, machine=None):
    """labels (n,) -> uint8 images (b, S, S, 3), chunk by chunk; image i depends on (seed, i)

    The ranks of `machine` take chunks in turn, and the first yields the images of all. Chunks are
    full, the last beyond the end: one shape to compile, the same numbers with any world."""
    rank, world = (machine.rank, machine.world) if machine else (0, 1)
    device, n = model.output.weight.device, len(labels)
    chunk = min(n, cfg.micro_batch or 25)
    for first in range(0, n, chunk * world):
        i = (torch.arange(chunk) + first + chunk * rank) % n
        noise = noise_of(cfg.seed, i, model.grid**2).to(device)
        codes = generate(model, labels[i].to(device), cfg.cfg_scale, cfg.temperature, cfg.top_k,
                         cfg.top_p, noise, bool(cfg.sample) and cfg.compile == "true", p)
        codes = rearrange(codes, "b (h w) -> b h w", h=model.grid)
        images = torch.cat([tokenizer.decode(x) for x in codes.split(25)])  # the decoder is large
        if cfg.image_size_eval:
            images = F.interpolate(images, (cfg.image_size_eval,) * 2, mode="bicubic")
        images = to_uint8(images)
        for r, part in enumerate(machine.gather(images) if machine else [images]):
            yield part[: max(0, n - first - chunk * r)]

def sample(cfg):
    """Draw samples from the checkpoint cfg.sample into cfg.out: a .png, or an .npz for fid.py

    Classes come in turn, each n / classes times, as in the reference. At random, as in LlamaGen's
    protocol, their shares differ from run to run, and scores with them."""
    machine, out, model = Machine(cfg.dtype), cfg.out or "samples.png", load_model(cfg.sample)
    png, names, known = out.endswith(".png"), model.facts["classes"], model.facts["grid"]
    if not out.endswith((".png", ".npz")):
        raise BadInput(f"{out}: expected .png or .npz")
    if not (path := cfg.tokenizer or model.facts["tokenizer"]):
        raise BadInput(f"{cfg.sample}: does not name its tokenizer, expected --tokenizer")
    tokenizer = load_tokenizer(path, machine.device, model.facts)
    model.grid = known or (cfg.image_size or 256) // tokenizer.factor
    size = model.grid * tokenizer.factor
    if cfg.image_size not in (0, size):
        raise BadInput(f"image_size is {cfg.image_size}, expected {size or tokenizer.factor}")
    model.to(machine.device, torch.bfloat16 if machine.bfloat16 else torch.float32)
    most = 10 if png else cfg.n or 10 * len(names)                        # a .png has ten rows
    if cfg.classes == "random":
        classes = torch.from_numpy(generator(cfg.seed, 4).integers(len(names), size=most))
    else:
        classes = class_numbers(cfg.classes, names, most)
    n = cfg.n or 10 * min(len(classes), len(names))
    n += -n % len(classes) if png else 0                                  # full rows
    labels, size = classes[torch.arange(n) % len(classes)], cfg.image_size_eval or size
    images = watched(draw(model, tokenizer, labels, cfg, machine=machine), n)
    if machine.rank > 0:
        list(images)                                                      # none: all are sent
    elif png:
        save_rows(out, images, len(classes))
    else:
        save_npz(out, images, (n, size, size, 3), labels.numpy())
    return 0

# ---- 8. What it costs, and the command line ----------------------------------------------------

def cost(size, patches=(2, 1), lam=0.5, vocab=16384, grid=16):
    """-> (average over the schedule, [of each stage]): forward multiply-adds an image

    The paper's "GFLOPs" (Table 2): linear layers and output head at N/K + 1 positions, no attention
    scores. `size` is a name such as "B", or a dict of n_layer, n_head and dim."""
    size = SIZES[size] if isinstance(size, str) else size
    dim = size["dim"]
    weights = size["n_layer"] * (4 * dim**2 + 3 * dim * ffn_width(dim)) + dim * vocab
    stages = [weights * (grid**2 // p**2 + 1) for p in patches]
    ends = [0, *(lam ** (len(patches) - 1 - i) for i in range(len(patches)))]
    return sum((b - a) * x for a, b, x in zip(ends, ends[1:], stages)), stages

def plan(cfg):
    """Print what each stage costs, and the whole against plain next-token prediction"""
    data = Codes(cfg.data, cfg.image_size or 256)
    cfg = check(cfg, data.facts)
    shape = dict(vocab=data.facts["vocab"], grid=data.facts["grid"])
    average, stages = cost(cfg.model, cfg.patches, cfg.lam, **shape)
    plain = cost(cfg.model, (1,), **shape)[0]
    with torch.device("meta"):
        model = Transformer(**SIZES[cfg.model], classes=len(data.facts["classes"]), **shape)
    print(f"{cfg.model}, {model.size():,} parameters\n"
          "  p       steps  positions  G multiply-adds an image   share")
    for (p, first, end), x in zip(spans(cfg.steps, cfg.patches, cfg.lam), stages):
        print(f"{p:3} {end - first:11,} {shape['grid'] ** 2 // p**2 + 1:10,} {x / 1e9:25.2f} "
              f"{(end - first) / cfg.steps * x / average:7.1%}")
    hours = 6 * average * cfg.steps * cfg.batch / cfg.tflops / 3.6e15     # 2 forward, 4 backward
    print(f"average {average / 1e9:.2f}, {average / plain:.4f} of the {plain / 1e9:.2f} of plain "
          f"next-token prediction; {hours:,.1f} hours at {cfg.tflops:g} TFLOP/s")
    return 0

def parse(argv):
    given = Parser(__doc__).given(Config, argv)
    recipe = TINY if given.get("model", "tiny") == "tiny" else {}
    return Config(**{**recipe, **({"steps": 0} if "epochs" in given else {}), **given})

@one_line_errors
def main(argv=None):
    cfg = parse(argv)
    check_ranges(cfg, RANGES)
    return (plan if cfg.plan else sample if cfg.sample else train)(cfg)

if __name__ == "__main__":
    sys.exit(main())
