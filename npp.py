"""Next Patch Prediction (Pang et al., arXiv 2412.15321) in one file

A tokenizer turns an image into a grid of N integers, its codes, and a transformer predicts them one
after the other. NPP changes only how the transformer is trained. It starts on patches of p x p
codes: their embeddings are averaged into one input (Eq. 2), and one output distribution predicts
all codes of the next patch (Eq. 3). The same weights are then trained on single codes (p = 1).
Sampling is plain next-token prediction. --patches 1 is next-token prediction from the start.

$ python npp.py                                          # minutes on a CPU, ends with pictures
$ torchrun --nproc_per_node=8 -- npp.py --model B --data codes/imagenet256        # the paper
$ python npp.py --sample out/tiny/ckpt.pt --classes Sandal,Bag --out bags.png
$ torchrun --nproc_per_node=8 -- npp.py --sample out/B/ckpt.pt --n 50000 --out b.npz

Shapes: B images of N = grid * grid codes, h * h patches of K = p * p codes, vocabulary V, S
positions of width D, H heads.
"""

import inspect
import json
import math
import os
import shlex
import signal
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

from tokenizer import (BadInput, Codes, check_image_size, class_numbers, load_tokenizer,
                       parse_flags, reading, replace_file, require, run_program, save_images, setup)

# ---- 1. Next patch prediction --------------------------------------------------------------------

def patchify(x, p):
    """Average the embeddings in each p x p block (Eq. 2): (B, N, D) -> (B, N/K, D)"""
    h = math.isqrt(x.shape[1]) // p
    return reduce(x, "b (h p1 w p2) d -> b (h w) d", "mean", h=h, p1=p, p2=p)


def patch_targets(codes, p):
    """The K codes of each p x p block: (B, N) -> (B, N/K, K)"""
    h = math.isqrt(codes.shape[1]) // p
    return rearrange(codes, "b (h p1 w p2) -> b (h w) (p1 p2)", h=h, p1=p, p2=p)


def npp_loss(logits, targets):
    """Patch cross-entropy (Eq. 3): logits (B, N/K, V), targets (B, N/K, K) -> mean nats per code

    Cross-entropy on logits repeated K times gives the same number at K times the memory.
    """
    log_probs = logits.log_softmax(-1)                      # (B, N/K, V)
    of_targets = log_probs.gather(-1, targets)              # (B, N/K, K)
    return -of_targets.mean()


def stages(total, patches, lam):
    """Stage i of L ends at round(total * lam^(L-1-i)) (Sec. 3.2) -> [(p, first step, end)]

    stages(100, (4, 2, 1), lam=0.5) is [(4, 0, 25), (2, 25, 50), (1, 50, 100)].
    """
    result = []
    first = 0
    for i, p in enumerate(patches):
        end = round(total * lam ** (len(patches) - 1 - i))
        result.append((p, first, end))
        first = end
    return result


def stage(step, total, patches, lam):
    """The stage of a step: its (p, first, end), where first <= step < end"""
    for p, first, end in stages(total, patches, lam):
        if step < end:
            return p, first, end


def lr_at(step, total, patches, lam, lr, lr_min, warmup, decay_frac):
    """Learning rate (Sec. 4.1): warm-up, plateau at lr, linear decay. It restarts in each stage.

    warmup is in steps, and may be a fraction. The decay fills the last decay_frac of the stage;
    lr_min would be reached one step after its end.
    """
    _, first, end = stage(step, total, patches, lam)
    warmup = max(1, min(warmup, (end - first) / 10))        # at most a tenth of the stage
    decay = max(1, decay_frac * (end - first))
    lr_min = min(lr_min, lr)                                # so that a decay never rises
    warmup_factor = min(1, (step - first + 1) / warmup)     # rises to 1
    decay_factor = min(1, (end - step) / decay)             # 1 until the decay begins
    return warmup_factor * (lr_min + (lr - lr_min) * decay_factor)


# ---- 2. Rotary positions in two dimensions -------------------------------------------------------

def rope_2d(h, head_dim, device=None):
    """cos and sin (1 + h*h, head_dim/2, 2) for an h x h grid of patches, class position first

    One half of the head turns with the row, the other with the column. Both are counted in patches:
    row 3 is farther down at p = 2 than at p = 1. The row of the class is zero (cos = 1 would be no
    turn), so its query and key are 0: it attends uniformly, and its score is 0 at every position.
    LlamaGen's published weights were trained this way.
    """
    frequency = 10000 ** -(torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))
    angle = torch.arange(h, device=device)[:, None] * frequency         # (h, head_dim/4)
    by_row = repeat(angle, "row f -> (row column) f", column=h)         # (h*h, head_dim/4)
    by_column = repeat(angle, "column f -> (row column) f", row=h)      # (h*h, head_dim/4)
    angle = torch.cat([by_row, by_column], dim=1)                       # (h*h, head_dim/2)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)             # (h*h, head_dim/2, 2)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x, rope):
    """Turn pairs (2j, 2j+1) of x (B, H, S, head_dim) by the angles of rope (S, head_dim/2, 2)"""
    pairs = rearrange(x.float(), "b head s (d pair) -> b head s d pair", pair=2)
    a, b = pairs.unbind(-1)                                             # (B, H, S, head_dim/2)
    cos, sin = rope.unbind(-1)                                          # (S, head_dim/2)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


# ---- 3. The transformer: a Llama with the names of LlamaGen's checkpoints ------------------------

class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None, position=None, mask=None):
        """x (B, S, D) -> (B, S, D), causal

        While sampling S = 1: key and value of x go into the cache (2, B, H, N/K, head_dim) at
        `position` (1,), and x attends to as many places of it as mask (1, length) has, except those
        that mask hides as not yet written.
        """
        q, k, v = rearrange(self.wqkv(x), "b s (qkv head d) -> qkv b head s d", qkv=3,
                            head=self.n_head)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache.index_copy_(3, position, torch.stack([k, v]))
            k, v = cache[:, :, :, : mask.shape[1]]                 # each (B, H, length, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = rearrange(y, "b head s d -> b s (head d)")
        return self.dropout(self.wo(y))


def ffn_width(dim):
    """Two thirds of 4 D, rounded up to a multiple of 256"""
    return 256 * math.ceil(int(8 * dim / 3) / 256)


class FeedForward(nn.Module):  # SwiGLU
    def __init__(self, dim, dropout):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_width(dim), bias=False)
        self.w3 = nn.Linear(dim, ffn_width(dim), bias=False)
        self.w2 = nn.Linear(ffn_width(dim), dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, n_head, dropout)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(self, x, rope, cache=None, position=None, mask=None):
        x = x + self.attention(self.attention_norm(x), rope, cache, position, mask)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class Transformer(nn.Module):
    """model(codes, labels, p) -> logits. Label number `classes` is the null label, for guidance.

    Every patch edge p uses every parameter: a patch has no weights of its own, and its position is
    computed, not learned. That is why the stages can share one set of weights.
    """

    def __init__(self, n_layer, n_head, dim, vocab, classes, grid, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        self.head_dim = dim // n_head
        self.classes = classes
        self.grid = grid                                                # codes along each side
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)                              # the first loss is ln V

    def embed_class(self, labels):
        return self.cls_embedding["embedding_table"](labels)[:, None]   # (B, 1, D)

    def embed_patches(self, codes, p):
        # Another way to aggregate a patch goes here. It must see only its own patch, as sampling
        # has no other, and change nothing at p = 1. Its weights belong at the end of __init__, so
        # that the others start as before; checkpoints without them no longer load. As p = 1 leaves
        # them unused, DDP (in train) needs find_unused_parameters=True; ignore its warning at p > 1
        # that there are none. If their shapes depend on p, build() and load_model() must pass the
        # patches to __init__.
        return patchify(self.tok_embeddings(codes), p)                  # (B, N/K, D)

    def forward(self, codes, labels, p=1, loss=False):
        """codes (B, N), labels (B,) -> float32 logits (B, N/K, V), or their loss

        The class goes in front and the last patch is dropped. So position i sees the class and the
        patches before i, and predicts patch i: all its K codes by one distribution.
        """
        x = self.embed_patches(codes, p)                                # (B, N/K, D)
        x = torch.cat([self.embed_class(labels), x[:, :-1]], dim=1)     # (B, N/K, D)
        x = self.tok_dropout(x)
        rope = rope_2d(self.grid // p, self.head_dim, x.device)[:-1]    # without the last patch
        for layer in self.layers:
            x = layer(x, rope)                                          # (B, N/K, D)
        logits = self.output(self.norm(x)).float()                      # (B, N/K, V)
        if loss:  # part of forward(), because that is all that DistributedDataParallel wraps
            return npp_loss(logits, patch_targets(codes, p))
        return logits

    def loss(self, codes, labels, p=1):
        """What training minimises: codes (B, N), labels (B,) -> scalar"""
        return self(codes, labels, p, loss=True)

    def next_logits(self, x, rope, caches, position, mask):
        """forward for one position, with a KV cache per layer: x (B, 1, D) -> logits (B, V)"""
        for layer, cache in zip(self.layers, caches):
            x = layer(x, rope, cache, position, mask)
        return self.output(self.norm(x))[:, 0].float()


# ---- 4. Sampling: plain next-token prediction ----------------------------------------------------

def choose(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw K codes from each distribution: logits (B, V), uniforms u (B, K) in [0, 1) -> (B, K)

    By the inverse CDF instead of torch.multinomial, so that u alone decides, up to rounding.
    """
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)         # (B, V)
        likelier = probs.cumsum(-1) - probs     # probability of all likelier codes together
        unlikely = torch.zeros_like(logits, dtype=torch.bool)
        unlikely = unlikely.scatter(-1, order, likelier > top_p)        # in the order of the codes
        logits = logits.masked_fill(unlikely, -math.inf)
    # float64: rounding must not select a code of probability 0
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)            # (B, V)
    u = u.double() * cdf[:, -1:]        # the last value is 1 but for rounding
    codes = torch.searchsorted(cdf, u, right=True)                      # the first with cdf > u
    return codes.clamp(max=logits.shape[-1] - 1)    # NaN logits give V; generate() refuses them


class CachedModel:
    """A model that runs one position at a time: cached(x, i), x (B, 1, D) -> logits (B, V)

    It keeps the keys and values of the positions so far, so that each is computed once.
    """

    def __init__(self, model, batch, p=1):
        h = model.grid // p
        weight = model.output.weight
        self.rope = rope_2d(h, model.head_dim, weight.device)
        self.positions = torch.arange(h * h, device=weight.device)
        shape = (2, batch, model.n_head, h * h, model.head_dim)         # 2: keys and values
        self.caches = [weight.new_zeros(shape) for _ in model.layers]
        self.next_logits = model.next_logits
        self.unit = 1

    def __call__(self, x, i):
        length = (i // self.unit + 1) * self.unit       # how much of the caches to read
        mask = (self.positions[:length] <= i)[None]     # hides what is not written (1, length)
        position = self.positions[i : i + 1]
        return self.next_logits(x, self.rope[i : i + 1], self.caches, position, mask)


@torch.no_grad()
def generate(model, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, noise=None, p=1,
             cached=None):
    """Draw codes, one position after the other: labels (B,) -> codes (B, N)

    All samples use p = 1, where K = 1 and patchify, patch_targets and the last rearrange change
    nothing: this is the usual loop. p > 1 only draws the pictures of earlier stages, all K codes of
    a patch from one distribution. Classifier-free guidance takes the logits
    uncond + cfg_scale * (cond - uncond). noise: uniform numbers (B, N); the same noise gives the
    same image. cached: a CachedModel to use again. Raises BadInput if logits are NaN or infinite.
    """
    was_training = model.training
    model.eval()
    if noise is None:
        noise = torch.rand(len(labels), model.grid**2, device=labels.device)
    noise = patch_targets(noise, p)         # grouped as the codes are    (B, N/K, K)
    guided = cfg_scale != 1
    if guided:  # one batch of both: with the class, and with the null label
        labels = torch.cat([labels, torch.full_like(labels, model.classes)])
    if cached is None:
        cached = CachedModel(model, len(labels), p)
    finite = torch.ones((), dtype=torch.bool, device=labels.device)

    codes = []
    x = model.embed_class(labels)                                       # (B or 2B, 1, D)
    for i in range(noise.shape[1]):
        logits = cached(x, i)                                           # (B or 2B, V)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)               # (B, V)
        finite &= logits.isfinite().all()   # asking in each step would wait for the GPU
        new = choose(logits, noise[:, i], temperature, top_k, top_p)    # (B, K)
        codes.append(new)
        x = model.embed_patches(new, p)     # K codes are one patch       (B, 1, D)
        if guided:
            x = torch.cat([x, x])
    model.train(was_training)
    require(finite, "logits are NaN or infinite, try a smaller --cfg_scale, or --dtype float32")
    codes = torch.stack(codes, dim=1)                                   # (B, N/K, K)
    return rearrange(codes, "b (h w) (p1 p2) -> b (h p1 w p2)", h=model.grid // p, p1=p)


# ---- 5. Settings, and batches that are a pure function of (seed, step) ---------------------------

SIZES = {  # beside each, its parameters in millions for a vocabulary of 16,384
    "tiny": dict(n_layer=4, n_head=4, dim=128),
    "B": dict(n_layer=12, n_head=12, dim=768),     # 111
    "L": dict(n_layer=24, n_head=16, dim=1024),    # 343
    "XL": dict(n_layer=36, n_head=20, dim=1280),   # 775
    "XXL": dict(n_layer=48, n_head=24, dim=1536),  # 1411
    "3B": dict(n_layer=24, n_head=32, dim=3200),   # 3097
}


@dataclass
class Config:
    # The defaults are the paper's. The default model, tiny, has its own: see TINY below.
    data: str = "data/fashion"   # folder of codes, written by tokenizer.py encode
    out: str = ""                # folder of the run (default: out/MODEL), or file of samples
    # These determine the result; resuming needs the same values.
    init: str = ""               # checkpoint whose weights to start from
    model: Literal["tiny", "B", "L", "XL", "XXL", "3B"] = "tiny"
    patches: tuple = (2, 1)      # patch edge p of each stage; 4,2,1 adds a level
    lam: float = 0.5             # stage i of L ends at lam^(L-1-i) of the steps; 4,2,1: 1/4, 1/2, 1
    epochs: float = 300.0        # passes over the images
    steps: int = 0               # total steps, instead of epochs
    batch: int = 256             # images in a step, over all ranks
    lr: float = 1e-4             # learning rate for 256 images: lr * batch / 256 is used
    lr_min: float = 1e-5         # where the decay of each stage ends: not scaled, as in the paper
    warmup_epochs: float = 1.0   # warm-up of each stage, at most a tenth of it
    decay_frac: float = 0.2      # last part of each stage, in which the rate decays
    weight_decay: float = 0.05   # of matrices and embeddings
    clip: float = 1.0            # largest gradient norm
    dropout: float = 0.1         # on token embeddings, attention and feed-forward outputs
    class_dropout: float = 0.1   # share of labels replaced by the null label, for guidance
    seed: int = 0                # of weights, batches, dropout and samples
    # These change only rounding and dropout masks; training amplifies both.
    micro_batch: int = 0         # images per forward; 0: a rank's share, in sampling up to 100
    compile: Literal["auto", "true", "false"] = "auto"      # auto: when training on a recent GPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a recent GPU
    log_every: int = 100         # steps between lines of log.jsonl
    eval_every: int = 2000       # steps between validation losses, each with a checkpoint
    # Sampling
    sample: str = ""             # checkpoint to sample from, instead of training
    n: int = 0                   # number of samples; 0: ten of each class
    # Sampling, and the pictures that training draws
    classes: str = ""            # Sandal,Bag or 5,8 or random; empty: all, in a .png at most ten
    cfg_scale: float = 2.0       # guidance; 1: none. The paper: B 2.0, L 1.75, XL 1.7, XXL 1.65
    temperature: float = 1.0     # divides the logits
    top_k: int = 0               # keep the k likeliest codes; 0: all
    top_p: float = 1.0           # keep the likeliest codes up to this probability
    tokenizer: str = ""          # file that turns codes into images (default: the data's own)
    image_size: int = 256        # pixels per side of images from published weights
    image_size_eval: int = 0     # resize samples to this many pixels before saving


TINY = dict(steps=1200, batch=64, lr=8e-3,   # the rate used is 8e-3 * 64 / 256 = 2e-3
            dropout=0.0, log_every=25, eval_every=200)

# Random numbers come from np.random.default_rng((seed, purpose, ...)). These are the purposes.
ORDER, VIEWS, DROPOUT, NOISE, CLASSES = range(5)


def batch_at(data, step, cfg, rows=slice(None)):
    """`rows` of the batch of a step -> codes (b, N), labels (b,), int64

    Each epoch visits the images in a new order. Every rank draws the numbers of the whole batch and
    then takes its rows, so any number of ranks and micro-batches trains on the same batch.
    """
    images = len(data.codes)
    visit = np.arange(step * cfg.batch, (step + 1) * cfg.batch)[rows]   # counted over all epochs
    epoch, offset = np.divmod(visit, images)
    index = np.array([epoch_order(images, cfg.seed, e)[i] for e, i in zip(epoch, offset)])
    rng = np.random.default_rng((cfg.seed, VIEWS, step))
    view = rng.integers(data.codes.shape[1], size=cfg.batch)[rows]
    drop = rng.random(cfg.batch)[rows] < cfg.class_dropout
    codes, labels = data.read((data.codes, data.labels), index, view)
    labels[torch.from_numpy(drop)] = len(data.meta["classes"])          # the null label
    return codes, labels


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(images, seed, epoch):
    return np.random.default_rng((seed, ORDER, epoch)).permutation(images)


# ---- 6. Training ---------------------------------------------------------------------------------

def build(cfg, meta, device):
    """-> a new model with the random weights of cfg.seed, and its optimizer"""
    torch.manual_seed(cfg.seed)
    model = Transformer(**SIZES[cfg.model], vocab=meta["vocab"], classes=len(meta["classes"]),
                        grid=meta["grid"], dropout=cfg.dropout)
    model.to(device)
    matrices = [w for w in model.parameters() if w.dim() >= 2]          # embeddings too
    vectors = [w for w in model.parameters() if w.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train_step(model, optimizer, codes, labels, p, clip=1.0, pieces=1, dtype="float32"):
    """Update the weights once: codes (b, N), labels (b,) -> this rank's loss, gradient norm

    Gradients add up over `pieces` micro-batches. After the last one DDP averages them over ranks.
    """
    autocast = torch.autocast(codes.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    mean_loss = torch.zeros((), device=codes.device)
    for i, (c, y) in enumerate(zip(codes.chunk(pieces), labels.chunk(pieces))):
        model.require_backward_grad_sync = (i == pieces - 1)            # DDP reads it in forward
        with autocast:
            loss = model(c, y, p, loss=True) / pieces
        loss.backward()
        mean_loss += loss.detach()              # .item() would wait for the GPU
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss, norm


def train(cfg, rank, world_size, device):
    """Train the run in cfg.out, or resume it -> exit code

    In one process on a CPU resuming is bit-exact, if micro_batch, dtype and compile stay: weights
    and moments come from the checkpoint; patch edge, learning rate and batch follow from the step;
    dropout is seeded in each step, so no generator has a state to keep. Several processes, or a
    GPU, may add up gradients in another order.
    """
    data = Codes(cfg.data, cfg.tokenizer)
    check(cfg, data, world_size)
    model, optimizer = build(cfg, data.meta, device)
    first, log = resume(cfg, data.meta, model, optimizer)
    recorder = Recorder(cfg, data, model, optimizer, first, log)
    if first == cfg.steps:
        return 0                                                        # the run is finished
    wrapped = model
    if world_size > 1:  # every p uses every parameter, so DDP never waits for a missing gradient
        wrapped = nn.parallel.DistributedDataParallel(model)
    if cfg.compile == "true":  # around DDP, which then exchanges gradients during the backward
        wrapped = torch.compile(wrapped, dynamic=False)                 # one graph for each p
    peak_lr = cfg.lr * cfg.batch / 256
    warmup = cfg.warmup_epochs * len(data.codes) / cfg.batch            # in steps
    # batch = ranks x pieces x micro_batch, such as 256 = 8 x 4 x 8; check() refuses a remainder
    local_batch = cfg.batch // world_size
    rows = slice(rank * local_batch, (rank + 1) * local_batch)
    pieces = local_batch // cfg.micro_batch if cfg.micro_batch else 1

    for step in range(first, cfg.steps):
        # From stage to stage only p changes. Weights and optimizer go on as they are.
        p, _, end = stage(step, cfg.steps, cfg.patches, cfg.lam)
        lr = lr_at(step, cfg.steps, cfg.patches, cfg.lam, peak_lr, cfg.lr_min, warmup,
                   cfg.decay_frac)
        for group in optimizer.param_groups:
            group["lr"] = lr
        codes, labels = batch_at(data, step, cfg, rows)     # read while a GPU is still computing
        codes = codes.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        dropout_seed = np.random.default_rng((cfg.seed, DROPOUT, step, rank)).integers(2**62)
        torch.manual_seed(dropout_seed)
        loss, norm = train_step(wrapped, optimizer, codes, labels, p, cfg.clip, pieces, cfg.dtype)

        done = step + 1
        recorder.losses.append(loss)
        stop = mean_over_ranks(torch.tensor(float(len(signals)))) > 0   # on any rank
        evaluate = done == end or done % cfg.eval_every == 0
        if stop or evaluate or done == 1 or done % cfg.log_every == 0:
            recorder.record(done, p, lr, norm, evaluate)
            if done == end:
                recorder.save(f"ckpt_p{p}.pt", done)
            if stop or evaluate:
                recorder.save("ckpt.pt", done)          # last, as resume() looks at this file alone
            if done == end:
                recorder.sample(p)
            recorder.window_start = time.time()         # the speed is that of training alone
        if stop and done < cfg.steps:
            print(f"stopped after step {done:,}; run the same command to resume")
            return 130
    return 0


# End of the method. The rest is plumbing.
# ---- 7. Logging, validation, checkpoints ---------------------------------------------------------

class Recorder:
    """Log, checkpoints and pictures of a run. All ranks take part in sums; only rank 0 writes.

    log: the lines so far. Checkpoints hold them too; on resume log.jsonl is rewritten from there.
    """

    def __init__(self, cfg, data, model, optimizer, first, log):
        self.cfg = cfg
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.log = log
        self.losses = []                        # of the steps since the last line
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if self.rank == 0 and first < cfg.steps:
            if first == 0:
                self.save("ckpt.pt", 0)         # the next start compares its flags with these
            with open(f"{cfg.out}/log.jsonl", "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in log)
            parameters = sum(w.numel() for w in model.parameters())
            print(f"{cfg.model}, {parameters:,} parameters; {data.meta['images']:,} images; "
                  f"{cfg.steps:,} steps; in {cfg.out}", flush=True)
        for p, _, end in stages(cfg.steps, cfg.patches, cfg.lam):
            if end <= first and not os.path.exists(self.picture(p)):
                self.sample(p)                  # a kill came between ckpt.pt and the picture
        self.window_start = time.time()

    def record(self, done, p, lr, norm, evaluate):
        """Add a line to the log, with a validation loss if asked, and show progress"""
        loss = mean_over_ranks(torch.stack(self.losses).mean()).item()
        speed = len(self.losses) * self.cfg.batch / (time.time() - self.window_start)
        self.losses = []
        require(math.isfinite(loss) and math.isfinite(norm), f"the loss is {loss} at step {done}, "
                f"the gradient norm {norm:g}: try a lower --lr. ckpt.pt holds an earlier step")
        line = {"step": done, "p": p, "loss": loss, "lr": lr, "img_s": round(speed, 1)}
        text = f"step {done:,}  p {p}  loss {loss:.3f}  {speed:,.0f} img/s"
        if evaluate and self.data.val:
            line["val_loss"] = validation_loss(self.model, self.data, self.cfg)
            text += f"  val (p 1) {line['val_loss']:.3f}"
        self.log.append(line)
        if self.rank == 0:
            with open(f"{self.cfg.out}/log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            # A step on patches costs about 1/p^2 of one on single codes.
            spans = stages(self.cfg.steps, self.cfg.patches, self.cfg.lam)
            work = sum((end - first) / q**2 for q, first, end in spans)
            left = sum(max(0, end - max(first, done)) / q**2 for q, first, end in spans)
            seconds = timedelta(seconds=round(left * p**2 * self.cfg.batch / speed))
            print(f"{1 - left / work:4.0%}  {text}  {seconds} left", flush=True)

    def save(self, name, done):
        """A checkpoint: step, log, config, model, optimizer, data.meta (sampling needs no data)"""
        if self.rank == 0:
            state = dict(self.data.meta, step=done, log=self.log, config=asdict(self.cfg),
                         model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
            replace_file(f"{self.cfg.out}/{name}", partial(torch.save, state))

    def picture(self, p):
        return f"{self.cfg.out}/samples.png" if p == 1 else f"{self.cfg.out}/samples_p{p}.png"

    def sample(self, p):
        """Ten samples of up to ten classes, as --sample draws them, but at the p of the stage"""
        if self.rank == 0:
            cfg = replace(self.cfg, sample=f"{self.cfg.out}/ckpt_p{p}.pt", out=self.picture(p),
                          n=0, micro_batch=0, compile="false")
            try:
                sample(cfg, 0, 1, self.model.output.weight.device, p)
            except (BadInput, RuntimeError) as error:  # out of memory, say: training goes on
                print(f"{cfg.out}: not drawn ({error})", flush=True)


def mean_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


signals = []  # those that came while training


def stop_after_step(number, frame):
    """Handles Ctrl-C and SIGTERM in training. The same signal again ends the program at once."""
    signals.append(number)
    signal.signal(number, signal.default_int_handler)


@torch.no_grad()
def validation_loss(model, data, cfg):
    """Mean loss over up to 2,048 validation images, always at p = 1, to compare the stages"""
    device = model.output.weight.device
    n = len(data.val[0])
    codes, labels = data.read(data.val, np.linspace(0, n - 1, min(2048, n)).astype(int))
    total = 0.0
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        for c, y in zip(codes.split(64), labels.split(64)):
            total += model.loss(c.to(device), y.to(device)).item() * len(c)
    model.train()
    return total / len(codes)


def check(cfg, data, world_size):
    """Fill in the number of steps, and refuse what cannot be trained"""
    if cfg.steps == 0:
        cfg.steps = round(cfg.epochs * len(data.codes) / cfg.batch)
    falling = sorted(set(cfg.patches), reverse=True)
    require(list(cfg.patches) == falling and falling[-1] == 1,
            f"patches is {cfg.patches}, expected edges that decrease to 1")
    grid = data.meta["grid"]
    require(all(grid % p == 0 for p in cfg.patches),
            f"patches is {cfg.patches}, expected divisors of {grid}")
    for p, first, end in stages(cfg.steps, cfg.patches, cfg.lam):
        require(first < end, f"steps is {cfg.steps} and lam {cfg.lam}: no step is left for p = {p}")
    require(end == cfg.steps, f"stages() ends at step {end}, expected {cfg.steps}")
    multiple = world_size * max(1, cfg.micro_batch)
    require(cfg.batch % multiple == 0, f"batch is {cfg.batch}, expected a multiple of {multiple} "
            f"({world_size} ranks, micro_batch {cfg.micro_batch})")


# What must be the same when a run is resumed: flags (epochs as steps), and the data set
RECIPE = ("init model patches lam steps batch lr lr_min warmup_epochs decay_frac weight_decay clip "
          "dropout class_dropout seed vocab grid images classes tokenizer_sha256").split()


def resume(cfg, meta, model, optimizer):
    """Load the checkpoint of this run, or else the weights of --init -> step and log so far"""
    path = f"{cfg.out}/ckpt.pt"
    step = 0
    log = []
    if os.path.exists(path):
        with reading(path, "a checkpoint of npp.py") as saved:
            now = asdict(cfg) | meta
            was = asdict(Config()) | saved["config"]                    # may lack a newer flag
            was |= {name: saved[name] for name in meta if name in RECIPE}
            changes = [f"saved with {name} {was[name]}, now {now[name]}" for name in RECIPE
                       if was[name] != now[name]]
            require(not changes, f"{path}: {'; '.join(changes)}; choose another --out, and --init "
                    f"{shlex.quote(path)} to start from its weights")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
            log = saved.get("log", [])
    elif cfg.init:
        weights = load_model(cfg.init).state_dict()
        table = "cls_embedding.embedding_table.weight"
        if len(weights[table]) != model.classes + 1:                    # another number of classes
            weights[table] = model.state_dict()[table]
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise BadInput(f"{cfg.init}: not weights of --model {cfg.model} ({error})") from None
    # All ranks wait here, so rank 0 does not write the file before all have looked for it.
    mean = mean_over_ranks(torch.tensor(step, dtype=torch.float64)).item()
    require(mean == step, f"{path}: ranks see different checkpoints, this one step {step}. Is the "
            "folder shared?")
    if step == cfg.steps:
        print(f"{cfg.out} is finished after {step:,} steps. To train its weights further, give "
              f"--init {shlex.quote(path)} and another --out")
    return step, log


# ---- 8. Samples from a checkpoint, ours or a published one ---------------------------------------

def load_model(path, grid=None):
    """A Transformer in eval mode; model.meta is what the file says about its data. Raises BadInput.

    Published checkpoints of LlamaGen and NPP record neither heads nor grid. Heads are then taken as
    64 wide (100 in 3B) and the grid as 16 x 16; sample() sets the grid from --image_size.
    """
    with reading(path, "a transformer of LlamaGen or NPP") as saved:
        state = saved                                   # the weights themselves, or under a name
        for key in ("model", "module", "state_dict"):   # ours and LlamaGen's, DeepSpeed's, others
            state = saved.get(key, state)
        # DDP, torch.compile and Lightning put a prefix in front of every name.
        name = "tok_embeddings.weight"
        prefix = next((key for key in state if key.endswith(name)), name).removesuffix(name)
        state = {key.removeprefix(prefix): weight for key, weight in state.items()}
        vocab, dim = state["tok_embeddings.weight"].shape
        classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        size = {"n_layer": sum(key.endswith("attention.wo.weight") for key in state),
                "n_head": dim // (100 if dim == 3200 else 64), "dim": dim}
        if "config" in saved:
            size = SIZES[saved["config"]["model"]]
        meta = {"vocab": vocab, "classes": saved.get("classes", [str(i) for i in range(classes)])}
        for name in ("grid", "tokenizer", "tokenizer_sha256"):
            meta[name] = saved.get(name)
        if grid is None:
            grid = meta["grid"] if meta["grid"] else 16
        with torch.device("meta"):  # the weights come from the file, none are drawn
            model = Transformer(**size, vocab=vocab, classes=classes, grid=grid)
        model.load_state_dict(state, assign=True)
    model.meta = meta
    return model.float().eval()


def compile_steps(cached):
    """Let a CachedModel replay CUDA graphs: launching kernels from Python is slower"""
    # Each length read from the caches is compiled separately, so at most four are used.
    cached.unit = math.ceil(len(cached.positions) / 4)
    cached.next_logits = torch.compile(cached.next_logits, mode="reduce-overhead", dynamic=False)
    for cache in cached.caches:  # a graph reads and writes the same memory each time
        torch._dynamo.mark_static_address(cache)


def noise_of(seed, numbers, length):
    """Uniforms (len(numbers), length): those of image i depend on seed and i, not on its chunk"""
    generators = [np.random.default_rng((seed, NOISE, int(i))) for i in numbers]
    return torch.from_numpy(np.stack([g.random(length, np.float32) for g in generators]))


def draw(model, tokenizer, labels, cfg, p=1, rank=0, world_size=1):
    """labels (n,) -> chunks of uint8 images (b, H, W, 3), in order, all of them on every rank

    Every chunk has the same size, because a compiled model accepts only one. The last ones are
    padded with images from the start, and the padding is cut off: of 7 images in chunks of 2 on 2
    ranks, rank 0 draws 0 1 and 4 5, rank 1 draws 2 3 and 6 0.
    """
    weight = model.output.weight
    n = len(labels)
    sequences = 1 if cfg.cfg_scale == 1 else 2          # per image
    chunk = cfg.micro_batch
    if chunk == 0:  # up to 100, with at most 8 GiB of keys and values
        keys = len(model.layers) * (model.grid // p) ** 2 * weight.shape[1]
        chunk = max(1, min(100, 2**33 // (2 * keys * sequences * weight.itemsize)))
    chunk = min(chunk, math.ceil(n / world_size))
    cached = CachedModel(model, sequences * chunk, p)
    if cfg.compile == "true":
        compile_steps(cached)
    start = time.time()
    for first in range(0, n, chunk * world_size):
        index = (first + rank * chunk + torch.arange(chunk)) % n
        noise = noise_of(cfg.seed, index, model.grid**2).to(weight.device)
        codes = generate(model, labels[index].to(weight.device), cfg.cfg_scale, cfg.temperature,
                         cfg.top_k, cfg.top_p, noise, p, cached)
        images = torch.from_numpy(tokenizer.pixels(codes, cfg.image_size_eval))
        if world_size > 1:
            parts = [torch.empty_like(images) for _ in range(world_size)]
            dist.all_gather(parts, images)
            images = torch.cat(parts)
        yield images[: n - first].numpy()
        done = min(n, first + chunk * world_size)
        left = timedelta(seconds=round((time.time() - start) / done * (n - done)))
        print(f"{done:,} of {n:,} images  {left} left", flush=True)


def sample(cfg, rank, world_size, device, p=1):
    """Draw samples from the checkpoint cfg.sample into cfg.out -> exit code

    Labels cycle through the classes, as in ADM's reference. With --classes random, as in LlamaGen's
    protocol, the shares of the classes differ from seed to seed, and so do the scores.
    """
    model = load_model(cfg.sample)
    names = model.meta["classes"]
    path = cfg.tokenizer if cfg.tokenizer else str(model.meta["tokenizer"])
    require(os.path.exists(path), f"tokenizer {path} not found; pass its path with --tokenizer")
    tokenizer = load_tokenizer(path, device, model.meta)
    if model.meta["grid"] is None:  # our own checkpoints record it
        model.grid = check_image_size(cfg.image_size, tokenizer) // tokenizer.factor
    model.to(device, getattr(torch, cfg.dtype))

    most = 10 if cfg.out.endswith(".png") else len(names)
    classes = class_numbers("" if cfg.classes == "random" else cfg.classes, names, most)
    n = cfg.n if cfg.n else 10 * len(classes)
    labels = classes[torch.arange(n) % len(classes)]
    if cfg.classes == "random":
        rng = np.random.default_rng((cfg.seed, CLASSES))
        labels = torch.from_numpy(rng.integers(len(names), size=n))
    images = draw(model, tokenizer, labels, cfg, p, rank, world_size)
    if rank == 0:
        save_images(cfg.out, images, labels)
        shown = [names[i] for i in dict.fromkeys(labels.tolist())]      # as the rows of a .png
        print(f"see {cfg.out}: {', '.join(shown[:10])}")
    else:
        for _ in images:  # this rank draws its share, and rank 0 saves all
            pass
    return 0


# ---- 9. Command line -----------------------------------------------------------------------------

def parse(argv):
    """Every field of Config is a flag -> Config. Raises BadInput."""
    text = (f"{__doc__}\nEach field of Config is a flag, such as --model B --patches 4,2,1.\n\n"
            f"{inspect.getsource(Config)}\nThe model tiny has its own defaults: {TINY}")
    given = parse_flags("npp.py", text, Config, argv)
    values = {}
    if given.get("model", "tiny") == "tiny":
        values.update(TINY)
    if "epochs" in given:  # overrides tiny's steps; --steps overrides both
        values["steps"] = 0
    cfg = Config(**(values | given))
    for name in ("batch", "log_every", "eval_every", "clip"):
        require(getattr(cfg, name) > 0, f"{name} is 0, expected more")
    for name in ("dropout", "class_dropout", "decay_frac"):
        require(getattr(cfg, name) <= 1, f"{name} is {getattr(cfg, name)}, expected at most 1")
    if not cfg.out:
        cfg.out = "samples.png" if cfg.sample else f"out/{cfg.model}"
    recent_gpu = torch.cuda.is_bf16_supported(including_emulation=False)   # T4 and V100 are not
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if recent_gpu else "float32"
    if cfg.compile == "auto":
        cfg.compile = "true" if recent_gpu and not cfg.sample else "false"
    return cfg


def main(argv=None):
    """-> exit code: 0, or 130 after a signal. Raises BadInput."""
    rank, world_size, device = setup()
    cfg = parse(argv)
    if cfg.sample:
        return sample(cfg, rank, world_size, device)
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, stop_after_step)
        signal.signal(signal.SIGTERM, stop_after_step)
    return train(cfg, rank, world_size, device)


if __name__ == "__main__":
    run_program(main, "npp.py")
