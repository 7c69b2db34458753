"""Next Patch Prediction (Pang et al., arXiv 2412.15321) in one file

A tokenizer turns an image into a grid of N integers, its codes, and a transformer predicts them one
after the other. NPP changes only how the transformer is trained. It starts on patches of p x p
codes: their embeddings are averaged into one input (Eq. 2), and one output distribution predicts
all codes of the next patch (Eq. 3). The same weights are then trained on single codes (p = 1).
Sampling is plain next-token prediction. --patches 1 is next-token prediction from the start.

$ python npp.py                                          # minutes on a CPU, ends with pictures
$ torchrun --nproc_per_node=8 npp.py --model B --data codes/imagenet256           # the paper
$ python npp.py --sample out/tiny/ckpt.pt --classes Sandal,Bag --out bags.png
$ torchrun --nproc_per_node=8 -- npp.py --sample out/B/ckpt.pt --n 50000 --out b.npz
(Without the -- torchrun would read --n as a flag of its own.)

Shapes: B images of N = grid * grid codes, h * h patches of K = p * p codes, vocabulary V, S
positions of width D, H heads.
"""

import argparse
import fcntl
import inspect
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # unused here; if DDP imports it late, the exit can crash
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

from tokenizer import (BadInput, Parser, complain, integers, load_file, load_tokenizer, open_codes,
                       read_meta, replace_file, require, save_images, setup, to_uint8,
                       wait_for_ranks)

# -------------------------------------------------------------------------------------------------
# Configuration: every field is a flag, and --help prints this class

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
    # The defaults are the paper's. But the default model, tiny, has its own steps, batch, lr, ..
    data: str = "data/fashion"   # folder of codes, written by tokenizer.py encode
    out: str = ""                # folder of the run (default: out/MODEL), or file of samples
    init: str = ""               # checkpoint whose weights to start from
    # These decide the result: a run is resumed only with the same values.
    model: str = "tiny"          # tiny, B, L, XL, XXL or 3B
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
    # These change the result by rounding or dropout masks at most.
    micro_batch: int = 0         # images in one forward; 0: a rank's whole share, 100 when sampling
    compile: str = "auto"        # true, false, or auto: true for training on a GPU
    dtype: str = "auto"          # float32, bfloat16, or auto: bfloat16 on a GPU
    log_every: int = 100         # steps between lines of log.jsonl
    eval_every: int = 2000       # steps between validation losses
    save_every: int = 2000       # steps between checkpoints
    # These are about samples.
    sample: str = ""             # checkpoint to sample from, instead of training
    n: int = 0                   # number of samples; 0: ten of each class
    # These are about samples, and about the pictures that training draws.
    classes: str = ""            # Sandal,Bag or 5,8 or random; empty: all, in a .png at most ten
    cfg_scale: float = 2.0       # guidance scale; 1: no guidance
    temperature: float = 1.0     # divides the logits
    top_k: int = 0               # keep the k likeliest codes; 0: all
    top_p: float = 1.0           # keep the likeliest codes up to this probability
    tokenizer: str = ""          # file that turns codes into images (default: the data's own)
    image_size: int = 0          # pixels a side, if the checkpoint does not tell (default: 256)
    image_size_eval: int = 0     # resize samples to this many pixels before saving


TINY = dict(steps=1200, batch=64, lr=8e-3,   # the rate used is 8e-3 * 64 / 256 = 2e-3
            dropout=0.0, log_every=25, eval_every=200, save_every=200)

# Random numbers come from np.random.default_rng((seed, purpose, ..)). These are the purposes.
ORDER, VIEWS, DROPOUT, NOISE, CLASSES = range(5)

# The flags that must be the same where a run is resumed. Epochs are compared as steps.
RECIPE = ("model patches lam steps batch lr lr_min warmup_epochs decay_frac weight_decay "
          "clip dropout class_dropout seed").split()

# -------------------------------------------------------------------------------------------------
# 1. Next patch prediction


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
    """The stage that a step below total belongs to: (p, first, end), first <= step < end"""
    for p, first, end in stages(total, patches, lam):
        if step < end:
            return p, first, end


def lr_at(step, total, patches, lam, lr, lr_min, warmup, decay_frac):
    """Learning rate, in each stage afresh (Sec. 4.1): linear warm-up, plateau at lr, linear decay

    warmup is in steps. The decay takes the last decay_frac of the stage. At step = end, just after
    the stage, it would have reached lr_min.
    """
    _, first, end = stage(step, total, patches, lam)
    warmup = max(1, min(warmup, (end - first) / 10))        # at most a tenth of the stage
    decay = max(1, decay_frac * (end - first))
    lr_min = min(lr_min, lr)                                # so that a decay never rises
    warmup_factor = min(1, (step - first + 1) / warmup)     # rises to 1
    decay_factor = min(1, (end - step) / decay)             # 1 until the decay begins
    return warmup_factor * (lr_min + (lr - lr_min) * decay_factor)


# -------------------------------------------------------------------------------------------------
# 2. Rotary positions in two dimensions


def rope_2d(h, head_dim, device=None):
    """cos and sin (1 + h*h, head_dim/2, 2) for an h x h grid of patches, class position first

    One half of the head turns with the row, the other with the column. Both are counted in patches:
    row 3 is farther down at p = 2 than at p = 1. The class has cos = sin = 0 (no turn would have
    cos = 1). So its query and key are 0, and its score before the softmax is 0 at every position:
    an oddity of LlamaGen that the published weights were trained with.
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


# -------------------------------------------------------------------------------------------------
# 3. The transformer: a Llama whose parts are named as in LlamaGen's published checkpoints


class KVCache:
    """Keys and values of one layer at the positions so far, while sampling"""

    def __init__(self, batch, n_head, positions, head_dim, like):
        self.k = like.new_zeros(batch, n_head, positions, head_dim)
        self.v = like.new_zeros(batch, n_head, positions, head_dim)

    def update(self, position, k, v, length):
        """Store k and v (B, H, 1, head_dim) at position (1,), return the first `length` of each"""
        self.k.index_copy_(2, position, k.type_as(self.k))
        self.v.index_copy_(2, position, v.type_as(self.v))
        return self.k[:, :, :length], self.v[:, :, :length]


class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None, position=None, mask=None):
        """x (B, S, D) -> (B, S, D), causal

        With a KV cache x is a single position, position (1,) says which, and mask (1, length)
        says which of the first `length` positions it attends to.
        """
        q, k, v = rearrange(self.wqkv(x), "b s (qkv head d) -> qkv b head s d", qkv=3,
                            head=self.n_head)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.update(position, k, v, length=mask.shape[1])   # (B, H, length, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = rearrange(y, "b head s d -> b s (head d)")
        return self.dropout(self.wo(y))


def ffn_width(dim):
    """Two thirds of 4 D, rounded up to a multiple of 256"""
    return 256 * math.ceil(int(8 * dim / 3) / 256)


class FeedForward(nn.Module):
    """SwiGLU"""

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
        # Another way to aggregate a patch goes here, for training and sampling; at p = 1 it should
        # change nothing. If it has weights, make them at the end of __init__, so that the others
        # start as before. Shapes depend on p, so build and load_model must pass the patches to
        # Transformer; files without these weights are then refused. Where some p does not use them,
        # DistributedDataParallel needs find_unused_parameters=True.
        return patchify(self.tok_embeddings(codes), p)                  # (B, N/K, D)

    def forward(self, codes, labels, p=1):
        """codes (B, N), labels (B,) -> float32 logits (B, N/K, V)

        The class goes in front and the last patch is dropped. So position i sees the class and the
        patches before i, and predicts patch i: all its K codes by one distribution.
        """
        x = self.embed_patches(codes, p)                                # (B, N/K, D)
        x = torch.cat([self.embed_class(labels), x[:, :-1]], dim=1)     # (B, N/K, D)
        x = self.tok_dropout(x)
        rope = rope_2d(self.grid // p, self.head_dim, x.device)         # of the class and patches
        rope = rope[:-1]                    # without the dropped one     (N/K, head_dim/2, 2)
        for layer in self.layers:
            x = layer(x, rope)                                          # (B, N/K, D)
        return self.output(self.norm(x)).float()                        # (B, N/K, V)

    def loss(self, codes, labels, p=1):
        """What training minimises: codes (B, N), labels (B,) -> scalar"""
        return npp_loss(self(codes, labels, p), patch_targets(codes, p))

    def next_logits(self, x, rope, caches, position, mask):
        """forward for one position with a KV cache per layer: x (B, 1, D) -> logits (B, V)"""
        for layer, cache in zip(self.layers, caches):
            x = layer(x, rope, cache, position, mask)
        return self.output(self.norm(x))[:, 0].float()


# -------------------------------------------------------------------------------------------------
# 4. Sampling: plain next-token prediction. In the last stage, p = 1, the average of a patch is the
# embedding of its one code, as in a model that never saw patches.


def choose(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw K codes from each distribution: logits (B, V), uniforms u (B, K) in [0, 1) -> (B, K)

    By the inverse CDF and not torch.multinomial: the same u gives the same code on any machine.
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
    u = u.double() * cdf[:, -1:]        # times the whole mass, 1 but for rounding
    codes = torch.searchsorted(cdf, u, right=True)                      # the first with cdf > u
    return codes.clamp(max=logits.shape[-1] - 1)    # NaN logits give V; generate() refuses them


class CachedModel:
    """A model that runs one position at a time: cached(x, i), x (B, 1, D) -> logits (B, V)

    It keeps the keys and values of the positions before i, so that each is computed once.
    CompiledModel (section 8) is the same for a GPU. It reads more of the caches than is filled, and
    the mask hides the rest. Here the mask hides nothing.
    """

    def __init__(self, model, batch, p=1):
        h = model.grid // p
        weight = model.output.weight
        self.rope = rope_2d(h, model.head_dim, weight.device)
        self.positions = torch.arange(h * h, device=weight.device)
        self.caches = [KVCache(batch, model.n_head, h * h, model.head_dim, like=weight)
                       for _ in model.layers]
        self.next_logits = model.next_logits

    def cache_length(self, i):
        """How many positions of the caches to read at position i"""
        return i + 1

    def __call__(self, x, i):
        length = self.cache_length(i)
        mask = (self.positions[:length] <= i)[None]                     # (1, length)
        position = self.positions[i : i + 1]
        return self.next_logits(x, self.rope[i : i + 1], self.caches, position, mask)


@torch.no_grad()
def generate(model, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, noise=None,
             compile=False, p=1, cached=None):
    """Draw codes, one position after the other: labels (B,) -> codes (B, N)

    Classifier-free guidance takes the logits uncond + cfg_scale * (cond - uncond). noise: uniform
    numbers (B, N); the same noise gives the same image. p > 1 shows what a patch stage has learned:
    all K codes of a patch are drawn from one distribution. cached: a CachedModel to use again.
    Raises BadInput if logits are NaN or infinite.
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
        kind = CompiledModel if compile else CachedModel
        cached = kind(model, len(labels), p)
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


def noise_of(seed, numbers, length):
    """Uniforms (len(numbers), length): those of image i depend on seed and i, not on its chunk"""
    generators = [np.random.default_rng((seed, NOISE, int(i))) for i in numbers]
    return torch.from_numpy(np.stack([g.random(length, np.float32) for g in generators]))


# -------------------------------------------------------------------------------------------------
# 5. Data: batches that are a pure function of (seed, step)


class Codes:
    """A folder that tokenizer.py encode wrote. Raises BadInput.

    codes (images, views, N) and labels (images,) are memory-mapped. The views of an image are the
    crops of it that were encoded; training draws one at random. val is the same pair for the
    validation split, or None. meta is meta.json (vocab, grid, image_size, classes, tokenizer, ..)
    and the number of images; checkpoints hold it too.
    """

    def __init__(self, folder):
        self.folder = folder
        self.meta = read_meta(folder)
        self.codes, self.labels = open_codes(folder, self.meta)
        self.meta["images"] = len(self.codes)
        self.val = None
        if os.path.exists(os.path.join(folder, "codes_val.npy")):
            self.val = open_codes(folder, self.meta, "_val")

    def read(self, split, index, view=0):
        """Codes and labels of the images (b,) of a split -> int64 tensors (b, N), (b,)"""
        all_codes, all_labels = split
        codes = all_codes[index, view]
        if codes.max() >= self.meta["vocab"]:
            worst = codes.max(axis=1).argmax()
            raise BadInput(f"{all_codes.filename}: image {index[worst]} has code {codes.max()}, "
                           f"expected 0 to {self.meta['vocab'] - 1}")
        return torch.from_numpy(codes).long(), torch.from_numpy(all_labels[index]).long()


def batch_at(data, step, cfg, rows=slice(None)):
    """`rows` of the batch of a step -> codes (b, N), labels (b,), int64

    Each epoch visits the images in a new order. Every rank draws the numbers of the whole batch and
    then takes its rows, so any number of ranks and micro-batches trains on the same batch.
    """
    images = len(data.codes)
    position = np.arange(step * cfg.batch, (step + 1) * cfg.batch)      # over all epochs
    epoch, offset = np.divmod(position, images)
    index = [epoch_order(images, cfg.seed, e)[i] for e, i in zip(epoch, offset)]
    index = np.array(index)[rows]
    rng = np.random.default_rng((cfg.seed, VIEWS, step))
    view = rng.integers(data.codes.shape[1], size=cfg.batch)[rows]
    drop = rng.random(cfg.batch)[rows] < cfg.class_dropout
    codes, labels = data.read((data.codes, data.labels), index, view)
    labels[torch.from_numpy(drop)] = len(data.meta["classes"])          # the null label
    return codes, labels


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(images, seed, epoch):
    return np.random.default_rng((seed, ORDER, epoch)).permutation(images)


# -------------------------------------------------------------------------------------------------
# 6. Training


def fetch(data, step, cfg, rows, device):
    codes, labels = batch_at(data, step, cfg, rows)
    if device.type == "cuda":  # a copy from pinned memory runs in the background
        codes, labels = codes.pin_memory(), labels.pin_memory()
    return codes.to(device, non_blocking=True), labels.to(device, non_blocking=True)


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


class Loss(nn.Module):
    """DistributedDataParallel wraps only a forward(), so the loss has to be one"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, codes, labels, p):
        return self.model.loss(codes, labels, p)


def train(cfg):
    """Train, or go on training, the run in cfg.out -> exit code

    A resumed run is bit-exact in one process on a CPU, if micro_batch, dtype and compile stay:
    - the checkpoint holds the weights and the optimizer's moments;
    - patch edge, learning rate and batch (with its views and dropped labels) follow from the step;
    - dropout is seeded anew in each step, so there is no state of a random generator to keep.
    Several processes, or a GPU, may add up gradients in another order.
    """
    rank, world_size, device = setup()
    data = Codes(cfg.data)
    fill_in(cfg, data, world_size)
    model, optimizer = build(cfg, data.meta, device)
    checkpoint = f"{cfg.out}/ckpt.pt"
    if cfg.init and not os.path.exists(checkpoint):
        start_from(model, cfg.init)
    watcher = Watcher(cfg, data, model, optimizer, rank)                # takes the folder cfg.out
    first = resume(checkpoint, cfg, data.meta, model, optimizer)
    watcher.start(first)

    loss_of = Loss(model)
    if world_size > 1:  # every p uses every parameter, so DDP never waits for a missing gradient
        loss_of = nn.parallel.DistributedDataParallel(loss_of)
    if cfg.compile == "true":  # DDP is compiled too, so it exchanges during the backward
        loss_of = torch.compile(loss_of, dynamic=False)                 # one graph for each p
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    peak_lr = cfg.lr * cfg.batch / 256
    warmup = cfg.warmup_epochs * len(data.codes) / cfg.batch            # in steps
    # 256 images on 8 ranks: 32 each, with micro_batch 8 in 4 pieces. (fill_in checks that it fits.)
    local_batch = cfg.batch // world_size
    rows = slice(rank * local_batch, (rank + 1) * local_batch)
    micro_batch = cfg.micro_batch if cfg.micro_batch else local_batch
    pieces = local_batch // micro_batch

    for step in range(first, cfg.steps):
        # From stage to stage only p changes. Weights and optimizer go on as they are.
        p, _, end = stage(step, cfg.steps, cfg.patches, cfg.lam)
        lr = lr_at(step, cfg.steps, cfg.patches, cfg.lam, peak_lr, cfg.lr_min, warmup,
                   cfg.decay_frac)
        for group in optimizer.param_groups:
            group["lr"] = lr
        codes, labels = fetch(data, step, cfg, rows, device)    # a GPU still computes the last step
        dropout_seed = np.random.default_rng((cfg.seed, DROPOUT, step, rank)).integers(2**62)
        torch.manual_seed(dropout_seed)

        # gradients add up over micro-batches, and after the last one DDP averages over ranks
        mean_loss = torch.zeros((), device=device)
        for i, (c, y) in enumerate(zip(codes.split(micro_batch), labels.split(micro_batch))):
            sync = nullcontext()
            if world_size > 1 and i < pieces - 1:
                sync = loss_of.no_sync()        # must cover the forward, where DDP reads it
            with sync, autocast:
                loss = loss_of(c, y, p) / pieces
            loss.backward()
            mean_loss += loss.detach()          # .item() would wait for the GPU
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()

        stopped = watcher.after_step(step + 1, p, end, lr, mean_loss, norm)
        if stopped:
            return 130                                                  # as a signal asked for it
    watcher.finish()
    return 0


# -------------------------------------------------------------------------------------------------
# The lesson ends here. 7 watches training, 8 loads models and draws samples, 9 reads the flags.
#
# 7. What only watches training, and saves it


class Watcher:
    """Log, progress line, validation, pictures and checkpoints of a run, and whether to stop it"""

    def __init__(self, cfg, data, model, optimizer, rank):
        self.cfg = cfg
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.rank = rank
        self.device = model.output.weight.device
        self.losses = []
        self.tokenizer = None
        if data.meta["tokenizer"]:
            self.tokenizer = load_tokenizer(data.meta["tokenizer"], self.device, data.meta)
        wanted = cfg.classes if cfg.classes != "random" else ""
        self.classes = class_numbers(wanted, data.meta["classes"], most=10)
        if rank == 0:
            self.lock = lock_folder(cfg.out)
        wait_for_ranks()                                # no rank reads the folder before it is ours

    def start(self, first):
        """Before the first step: cut the log, say where training stands"""
        wait_for_ranks()                                # rank 0 may write: all have read ckpt.pt
        self.first = first
        if self.rank == 0 and first == self.cfg.steps:
            say(f"{self.cfg.out} is finished after {first:,} steps")
        elif self.rank == 0:
            cut_log(self.path("log.jsonl"), first)
            if first == 0:
                self.save("ckpt.pt", 0)                 # so another recipe is refused from now on
            size = sum(w.numel() for w in self.model.parameters())
            say(f"{self.cfg.model}, {size:,} parameters; {self.data.meta['images']:,} images; "
                f"steps {first:,} to {self.cfg.steps:,}; in {self.cfg.out}")
        interrupt.save_on_signal = True
        self.seconds = 0.0                              # of training alone, without pictures
        self.window_start = time.time()

    def path(self, name):
        return os.path.join(self.cfg.out, name)

    def after_step(self, done, p, end, lr, step_loss, norm):
        """After `done` steps, in a stage that ends at `end` -> whether to stop here"""
        cfg = self.cfg
        self.losses.append(step_loss)
        stop = interrupt.first_signal is not None and done < cfg.steps  # see section 9
        if dist.is_initialized():
            # Any rank may have got the signal. They ask each other seldom, as that takes time.
            stop = done % 10 == 0 and any_rank(stop)
        save = stop or done == end or done % cfg.save_every == 0
        evaluate = done == end or done % cfg.eval_every == 0
        if not save and not evaluate and done % cfg.log_every > 0:
            return False

        loss = mean_over_ranks(torch.stack(self.losses).mean()).item()
        require(math.isfinite(loss) and math.isfinite(norm), f"the loss is {loss} at step {done}, "
                f"the gradient norm {norm:g}: try a lower --lr; the last checkpoint is older")
        seconds = time.time() - self.window_start
        self.seconds += seconds
        speed = len(self.losses) * cfg.batch / seconds
        record = {"step": done, "p": p, "loss": loss, "lr": lr, "img_s": round(speed, 1)}
        if evaluate and self.data.val:
            record["val_loss"] = validate(self.model, self.data, cfg, self.device)
        if self.rank == 0:
            self.log(record)
            if done == end:
                self.save(f"ckpt_p{p}.pt", done)
                self.save_samples(p)
            if save:
                self.save("ckpt.pt", done)              # last: resume looks at this file alone
        # Each checkpoint empties the list too, so a resumed run logs the same means.
        self.losses = []
        self.window_start = time.time()
        if stop:
            wait_for_ranks()                            # or torchrun ends rank 0 while it saves
            if self.rank == 0:
                say(f"\nstopped after step {done:,}: the same command goes on from there")
        return stop

    def log(self, record):
        """A line of log.jsonl, and the progress line"""
        path = self.path("log.jsonl")
        try:
            with open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error})") from None
        text = "step {step:,}  p {p}  loss {loss:.3f}  {img_s:,.0f} img/s".format(**record)
        if "val_loss" in record:
            text += f"  val (p 1) {record['val_loss']:.3f}"
        before = self.work(self.first)
        now = self.work(record["step"])
        total = self.work(self.cfg.steps)
        progress(f"{now / total:4.0%}  {text}", self.seconds * (total - now) / (now - before))

    def work(self, until):
        """Work done until a step: a step on patches costs about 1/p^2 of one on single codes"""
        spans = stages(self.cfg.steps, self.cfg.patches, self.cfg.lam)
        return sum(max(0, min(until, end) - first) / p**2 for p, first, end in spans)

    def save_samples(self, p):
        """Ten samples of up to ten classes, as the stage of p draws them"""
        if self.tokenizer:
            labels = self.classes.repeat(10)
            images = list(draw(self.model, self.tokenizer, labels, self.cfg, p))
            save_images(self.path(f"samples_p{p}.png"), images, labels.numpy())
            if p == 1:
                save_images(self.path("samples.png"), images, labels.numpy())

    def save(self, name, step):
        """A checkpoint: step, flags, weights, optimizer and, so that samples need no data set, the
        whole of data.meta (vocab, grid, images, classes, tokenizer, tokenizer_sha256, ..)
        """
        state = dict(self.data.meta, step=step, config=asdict(self.cfg),
                     model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        replace_file(self.path(name), lambda f: torch.save(state, f))

    def finish(self):
        if self.rank > 0 or self.tokenizer is None:
            return
        command = f"python npp.py --sample {self.path('ckpt.pt')}"
        rows = ", ".join(self.data.meta["classes"][i] for i in self.classes)
        say(f"\nsee {self.path('samples.png')}, row by row {rows}; then try\n"
            f"{command} --cfg_scale 4 --out strong.png")
        reference = os.path.join(self.cfg.data, "reference.npz")
        if os.path.exists(reference):
            say(f"{command} --n 1000 --out samples.npz && python fid.py samples.npz {reference}")


def mean_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


def any_rank(flag):
    """Whether the flag is set on at least one rank"""
    return mean_over_ranks(torch.tensor(float(flag))).item() > 0


@torch.no_grad()
def validate(model, data, cfg, device):
    """Mean loss over up to 2,048 validation images, always at p = 1, to compare the stages"""
    n = len(data.val[0])
    codes, labels = data.read(data.val, np.linspace(0, n - 1, min(2048, n)).astype(int))
    total = 0.0
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        for c, y in zip(codes.split(64), labels.split(64)):
            total += model.loss(c.to(device), y.to(device)).item() * len(c)
    model.train()
    return total / len(codes)


def resume(path, cfg, meta, model, optimizer):
    """Load a checkpoint of the same run -> its step, or 0 if there is none. Raises BadInput."""
    if not os.path.exists(path):
        return 0
    saved = load_file(path)
    try:
        config = dict(asdict(Config()), **saved["config"])  # a flag that it lacks has its default
        pairs = [(name, config[name], getattr(cfg, name)) for name in RECIPE]
        for name in ("vocab", "grid", "images", "classes", "tokenizer_sha256"):
            pairs.append((name, saved[name], meta[name]))
        pairs.append(("init", bool(config["init"]), bool(cfg.init)))    # its path may change
        differ = [f"{name} is {old} there, {new} here" for name, old, new in pairs if old != new]
        require(not differ, f"{cfg.out} holds another run, choose another --out "
                f"({'; '.join(differ)})")
        step = saved["step"]
        if type(step) is not int or not 0 <= step <= cfg.steps:
            raise ValueError(f"step {step} of {cfg.steps}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if step > 0 and not optimizer.state:
            raise ValueError("an optimizer without moments")
        for w, state in optimizer.state.items():
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == w.shape:
                raise ValueError("an optimizer of other weights")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: expected a checkpoint of npp.py ({error!r})") from None
    return step


def fill_in(cfg, data, world_size):
    """Fill in steps and out, and refuse what cannot be trained"""
    if not cfg.out:
        cfg.out = f"out/{cfg.model}"
    if cfg.tokenizer:
        data.meta["tokenizer"] = cfg.tokenizer
    if cfg.steps == 0:
        cfg.steps = round(cfg.epochs * len(data.codes) / cfg.batch)
    check_schedule(cfg.steps, cfg.patches, cfg.lam, data.meta["grid"])
    multiple = world_size * max(1, cfg.micro_batch)
    require(cfg.batch % multiple == 0, f"batch is {cfg.batch}, expected a multiple of {multiple} "
            f"({world_size} ranks, micro_batch {cfg.micro_batch})")


def check_schedule(steps, patches, lam, grid):
    falling = sorted(set(patches), reverse=True)
    require(list(patches) == falling and falling[-1] == 1,
            f"patches is {patches}, expected edges that decrease to 1")
    require(all(grid % p == 0 for p in patches),
            f"patches is {patches}, expected divisors of {grid}")
    require(0 < lam < 1, f"lam is {lam}, expected more than 0 and less than 1")
    for p, first, end in stages(steps, patches, lam):
        require(first < end, f"steps is {steps}, expected more: none is left for p = {p}")
    # It cannot fail, unless somebody changes stages().
    require(end == steps, f"the last stage ends at step {end}, expected {steps}")


def lock_folder(folder):
    """Keep other processes off the folder; the lock ends with this process, however it ends"""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, "lock"), "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise BadInput(f"{folder} is in use by another process, choose another --out") from None
    except OSError:  # a disk without locks, or one that is read-only: saving would say so
        return None


def cut_log(path, step):
    """Keep the lines up to `step`, without any that a crash left broken"""
    kept = []
    if os.path.exists(path):
        for line in open(path, "rb"):
            with suppress(ValueError, TypeError, LookupError):
                if json.loads(line)["step"] <= step:
                    kept.append(line.strip() + b"\n")
    replace_file(path, lambda f: f.writelines(kept))


# -------------------------------------------------------------------------------------------------
# 8. Samples from a checkpoint, ours or a published one


def load_model(path, n_head=None, grid=None):
    """A Transformer in eval mode; model.meta is what the file tells of its data. Raises BadInput.

    Published checkpoints of LlamaGen and NPP tell neither heads nor grid. Unless given, a head is
    taken to be 64 wide (100 in 3B) and the grid 16 codes a side; sample() asks --image_size.
    """
    saved = load_file(path)
    try:
        state = saved                                   # the weights themselves, or under a name
        for key in ("model", "module", "state_dict"):   # ours and LlamaGen's, DeepSpeed's, others
            state = saved.get(key, state)
        vocab, dim = state["tok_embeddings.weight"].shape
        classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        size = {"n_layer": sum(key.endswith("attention.wo.weight") for key in state),
                "n_head": n_head or dim // (100 if dim == 3200 else 64), "dim": dim}
        if "config" in saved:
            size = SIZES[saved["config"]["model"]]
        meta = {"vocab": vocab, "classes": saved.get("classes", [str(i) for i in range(classes)])}
        for name in ("grid", "tokenizer", "tokenizer_sha256"):
            meta[name] = saved.get(name)
        if len(meta["classes"]) != classes:
            raise ValueError(f"{len(meta['classes'])} names of {classes} classes")
        if grid is None:
            grid = meta["grid"] or 16
        if type(grid) is not int or grid < 1:
            raise ValueError(f"grid is {grid}")
        with torch.device("meta"):  # the weights come from the file, none are drawn
            model = Transformer(**size, vocab=vocab, classes=classes, grid=grid)
        model.load_state_dict(state, assign=True)
        for name, weight in model.state_dict().items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            RuntimeError) as error:
        raise BadInput(f"{path}: expected a transformer of LlamaGen or NPP ({error!r})") from None
    model.meta = meta
    return model.float().eval()


def start_from(model, path):
    """Copy the weights of another model; its class table only if there are as many classes"""
    weights = load_model(path).state_dict()
    table = "cls_embedding.embedding_table.weight"
    if len(weights[table]) != model.classes + 1:
        weights[table] = model.state_dict()[table]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{path}: not weights of this size ({error})") from None


def class_numbers(text, names, most):
    """Names or numbers with commas -> numbers (n,); by default `most` classes, evenly spread"""
    if not text:
        return torch.from_numpy(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))
    known = {str(i): i for i in range(len(names))}
    known.update({name: i for i, name in enumerate(names)})
    for name in text.split(","):
        require(name in known, f"classes is {text}, expected names like {names[0]}, or numbers "
                f"from 0 to {len(names) - 1}")
    return torch.tensor([known[name] for name in text.split(",")])


class CompiledModel(CachedModel):
    """A CachedModel whose steps are compiled and, on a GPU, replayed as CUDA graphs

    A GPU computes a position faster than Python can launch its kernels. A CUDA graph is a recording
    of them that is launched at once. It is replayed for every batch that this object draws.
    """

    def __init__(self, model, batch, p=1):
        super().__init__(model, batch, p)
        self.next_logits = torch.compile(model.next_logits, mode="reduce-overhead", dynamic=False)
        for cache in self.caches:  # a graph reads and writes the same memory each time
            torch._dynamo.mark_static_address(cache.k)
            torch._dynamo.mark_static_address(cache.v)

    def cache_length(self, i):
        """A graph has fixed shapes. One for each length would be too many, and one for all would
        always read whole caches. So there are four; the mask hides the positions after i.
        """
        quarter = math.ceil(len(self.positions) / 4)
        return min((i // quarter + 1) * quarter, len(self.positions))


def draw(model, tokenizer, labels, cfg, p=1, rank=0, world_size=1):
    """labels (n,) -> chunks of uint8 images (b, S, S, 3), in order; every rank gets those of all

    All chunks have one size, as a compiled model wants it. So the last ones are filled up with
    images from the start, which are cut off. 7 images in chunks of 2 on 2 ranks:
        rank 0 draws 0 1 and 4 5
        rank 1 draws 2 3 and 6 0
    """
    device = model.output.weight.device
    n = len(labels)
    chunk = min(math.ceil(n / world_size), cfg.micro_batch or 100)
    kind = CompiledModel if cfg.sample and cfg.compile == "true" else CachedModel
    cached = kind(model, chunk if cfg.cfg_scale == 1 else 2 * chunk, p)
    start_time = time.time()
    for first in range(0, n, chunk * world_size):
        index = (first + rank * chunk + torch.arange(chunk)) % n
        noise = noise_of(cfg.seed, index, model.grid**2).to(device)
        codes = generate(model, labels[index].to(device), cfg.cfg_scale, cfg.temperature, cfg.top_k,
                         cfg.top_p, noise, p=p, cached=cached)
        codes = rearrange(codes, "b (h w) -> b h w", h=model.grid)
        images = torch.cat([tokenizer.decode(x) for x in codes.split(25)])  # few, to fit memory
        if cfg.image_size_eval:
            images = F.interpolate(images, (cfg.image_size_eval,) * 2, mode="bicubic")
        images = torch.from_numpy(to_uint8(images))
        if world_size > 1:
            parts = [torch.empty_like(images) for _ in range(world_size)]
            dist.all_gather(parts, images)
            images = torch.cat(parts)
        yield images[: n - first].numpy()
        if cfg.sample and rank == 0:
            done = min(n, first + chunk * world_size)
            speed = done / (time.time() - start_time)
            progress(f"{done:,} of {n:,} images  {speed:,.1f} img/s", (n - done) / speed)


def sample(cfg):
    """Draw samples from the checkpoint cfg.sample into cfg.out -> exit code

    Classes come in turn, n / classes times each, as in ADM's reference. With --classes random, as
    in LlamaGen's protocol, their shares differ from seed to seed, and so do the scores.
    """
    rank, world_size, device = setup()
    if not cfg.out:
        cfg.out = "samples.png"
    model = load_model(cfg.sample)
    names = model.meta["classes"]
    path = cfg.tokenizer or model.meta["tokenizer"]
    require(path, f"{cfg.sample}: does not name its tokenizer, expected --tokenizer")
    require(os.path.exists(path), f"{path}: not found, expected --tokenizer with its place")
    tokenizer = load_tokenizer(path, device, model.meta)
    if model.meta["grid"] is None:  # the file does not tell, so the tokenizer's factor must
        model.grid = (cfg.image_size or 256) // tokenizer.factor
    pixels = model.grid * tokenizer.factor
    require(pixels > 0, f"image_size is {cfg.image_size}, expected {tokenizer.factor} or more")
    require(cfg.image_size in (0, pixels),
            f"image_size is {cfg.image_size}, expected {pixels}")
    model.to(device, getattr(torch, cfg.dtype))

    if cfg.classes == "random":
        rng = np.random.default_rng((cfg.seed, CLASSES))
        labels = torch.from_numpy(rng.integers(len(names), size=cfg.n or 10 * len(names)))
    else:
        most = 10 if cfg.out.endswith(".png") else len(names)
        classes = class_numbers(cfg.classes, names, most)
        labels = classes[torch.arange(cfg.n or 10 * len(classes)) % len(classes)]
    images = draw(model, tokenizer, labels, cfg, 1, rank, world_size)
    if rank == 0:
        save_images(cfg.out, images, labels.numpy())
    else:
        for _ in images:  # this rank draws its share, and rank 0 saves all
            pass
    return 0


# -------------------------------------------------------------------------------------------------
# 9. Terminal and command line


class Interrupt:
    """The handler of signals. While training the first one only asks to save and end. A second one,
    and any elsewhere, ends the program at once.
    """

    save_on_signal = False
    first_signal = None                                 # when it came, while training

    def __call__(self, number, frame):
        # torchrun passes a Ctrl-C on, so it may come twice: within two seconds it counts once.
        if self.save_on_signal and self.first_signal is None:
            self.first_signal = time.monotonic()
        elif not self.save_on_signal or time.monotonic() > self.first_signal + 2:
            raise KeyboardInterrupt


interrupt = Interrupt()


def say(text, end="\n"):
    """Print. If nobody reads it any more (npp.py | head -2), that counts as a signal."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        interrupt(signal.SIGPIPE, None)


def progress(text, seconds_left):
    """Show a line in place on a terminal, and in a file one below the other"""
    minutes, seconds = divmod(round(seconds_left), 60)
    line = f"{text}  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    if sys.stdout.isatty():
        say(f"\r\x1b[K{line}", end="")                   # erases the line before
    else:
        say(line)


def parse(argv):
    """Every field of Config is a flag -> Config. Raises BadInput."""
    own = ", ".join(f"{name} {value:g}" for name, value in TINY.items())
    text = (f"{__doc__}\nEvery field below is a flag, such as --model B --patches 4,2,1. "
            f"The model tiny has its own\ndefaults: {own}.\n\n{inspect.getsource(Config)}")
    parser = Parser("npp.py", "%(prog)s [--FLAG VALUE ..]", text, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = integers if f.type is tuple else f.type
        parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    values = {}
    if given.get("model", "tiny") == "tiny":
        values.update(TINY)
    if "epochs" in given:  # it replaces tiny's steps, and --steps replaces both
        values["steps"] = 0
    values.update(given)
    cfg = Config(**values)

    for name, value in values.items():
        if isinstance(value, (int, float)):
            limit = 2**31 if isinstance(value, int) else math.inf
            require(0 <= value < limit, f"{name} is {value}, expected 0 or more, below {limit}")
    for name in ("batch", "log_every", "eval_every", "save_every", "epochs", "clip", "top_p"):
        require(getattr(cfg, name) > 0, f"{name} is 0, expected more")
    for name in ("dropout", "class_dropout", "decay_frac", "top_p"):
        require(getattr(cfg, name) <= 1, f"{name} is {getattr(cfg, name)}, expected at most 1")
    gpu = torch.cuda.is_available()
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if gpu else "float32"
    if cfg.compile == "auto":
        cfg.compile = "true" if gpu and not cfg.sample else "false"
    words = {"model": SIZES, "compile": ("true", "false"), "dtype": ("float32", "bfloat16")}
    for name, allowed in words.items():
        value = getattr(cfg, name)
        require(value in allowed, f"{name} is {value}, expected {', '.join(allowed)}")
    return cfg


def main(argv=None):
    """-> exit code: 0, 2 after bad input, 130 after a signal"""
    try:
        cfg = parse(argv)
        return sample(cfg) if cfg.sample else train(cfg)
    except BadInput as error:
        complain(error, "npp.py")
        return 2
    except KeyboardInterrupt:
        complain("stopped", "npp.py")
        return 130
    except RuntimeError as error:
        if "by peer" not in str(error):  # a connection is closed or reset by it
            raise
        complain("another rank has ended, and so does this one", "npp.py")
        return 2
    finally:
        interrupt.save_on_signal = False
        interrupt.first_signal = None
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, interrupt)
    sys.exit(main())
