"""Draw method.png, the picture of the method in README.md (needs matplotlib)

    python data/pictures/method.py                  # or another file: method.svg for slides

The image, its codes and its class are those of a training image of data/fashion. A colour stands
for an embedding: it shows the first three principal components of the code's vector in the
tokenizer's codebook, and a patch has the mean colour of its codes. Patch 1 has an orange frame
wherever it appears. (The transformer learns embeddings of its own.)
"""

import os
import sys

import matplotlib
import torch
from einops import rearrange

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

import npp  # noqa: E402
from tokenizer import load_tokenizer, to_uint8  # noqa: E402

PICTURE = os.path.join(HERE, "method.png")
IMAGE = 1737                       # a T-shirt of the training split
INK = "#1b1f24"
GRAY = "#5b6570"
BLUE = "#2f6db3"
PAPER = "#eef3f9"
ORANGE = "#c8540a"
CLASS_COLOUR = "#f6d7b8"


# -------------------------------------------------------------------------------------------------
# What is drawn


def load():
    """-> codes (8, 8), image (32, 32, 3) uint8, colour of every code (256, 3), name of the class"""
    data = npp.Codes(os.path.join(ROOT, "data", "fashion"))
    tokenizer = load_tokenizer(data.meta["tokenizer"], "cpu", data.meta)
    codes = data.codes[IMAGE, 0].reshape(8, 8).astype(int)
    name = data.meta["classes"][data.labels[IMAGE]]
    with torch.no_grad():
        decoded = tokenizer.decode(torch.from_numpy(codes)[None])
        codebook = tokenizer.codebook()
    image = to_uint8(decoded)[0]
    centred = codebook - codebook.mean(0)
    directions = torch.linalg.svd(centred).Vh[:3]
    components = centred @ directions.T                                 # (256, 3)
    rank = components.argsort(0).argsort(0).numpy() / 255               # spread evenly over 0 .. 1
    return codes, image, 0.5 + 0.5 * rank, name


# -------------------------------------------------------------------------------------------------
# Pieces. Coordinates run from the upper left corner; 1200 of them are the width.


def text(ax, x, y, words, size=12, colour=INK, align="center", **more):
    ax.text(x, y, words, fontsize=size, color=colour, ha=align, va="center", **more)


def tile(ax, x, y, size, colour, words="", font=9.5, edge="white", width=1.0):
    square = Rectangle((x, y), size, size, facecolor=colour, edgecolor=edge, linewidth=width)
    ax.add_patch(square)
    text(ax, x + size / 2, y + size / 2, words, font)


def frame(ax, x, y, size, colour=INK, line=1.6):
    square = Rectangle((x, y), size, size, fill=False, edgecolor=colour, linewidth=line,
                       joinstyle="round")
    ax.add_patch(square)


def highlight(ax, x, y, size):
    """The frame of patch 1, which is to be followed through the picture"""
    frame(ax, x, y, size, ORANGE, 2.6)


def arrow(ax, start, end, colour=GRAY, line=1.4):
    patch = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour,
                            linewidth=line, shrinkA=0, shrinkB=0)
    ax.add_patch(patch)


def box(ax, x, y, width, height, words, small):
    patch = FancyBboxPatch((x, y), width, height, facecolor=BLUE, edgecolor=BLUE,
                           boxstyle="round,pad=0,rounding_size=9")
    ax.add_patch(patch)
    middle = x + width / 2
    y += height / 2
    text(ax, middle - 110, y, words, 15, "white", "right", weight="bold")
    text(ax, middle - 94, y, f"({small})", 12, "white", "left")


def label(ax, x, y, bold, words):
    text(ax, x, y, bold, 12, align="left", weight="bold")
    text(ax, x + 82, y, words, 12, align="left")


def block(ax, x, y, cell, codes, colours, font=9.5, line=1.6):
    """A square of codes with a frame around it"""
    edge = len(codes)
    for row in range(edge):
        for column in range(edge):
            code = codes[row, column]
            tile(ax, x + column * cell, y + row * cell, cell, colours[code], code, font)
    frame(ax, x, y, edge * cell, line=line)


# -------------------------------------------------------------------------------------------------
# The three parts of the picture


def draw_tokenizer(ax, codes, image, colours, name):
    text(ax, 150, 30, f"An image ({name})", 13.5, weight="bold")
    ax.imshow(image, extent=(60, 240, 228, 48), interpolation="nearest", zorder=2)
    frame(ax, 60, 48, 180, line=1.0)
    arrow(ax, (150, 236), (150, 288), line=2)
    text(ax, 162, 261, "tokenizer", 12.5, GRAY, "left")
    text(ax, 150, 307, "Its codes: 8 × 8 integers", 13.5, weight="bold")
    x = 18
    y = 326
    block(ax, x, y, 33, codes, colours, font=9.8)
    for row in range(4):
        for column in range(4):
            frame(ax, x + 66 * column, y + 66 * row, 66)
    highlight(ax, x + 66, y, 66)
    text(ax, 150, 610, "A colour stands for the", 11.5, GRAY)
    text(ax, 150, 629, "embedding of a code, a vector.", 11.5, GRAY)


def draw_stage(ax, top, p, codes, colours, name, slots, pitch, title, note):
    """One training stage: the grid of patches, the input sequence, the transformer, the targets"""
    patches = rearrange(codes, "(row i) (column j) -> (row column) i j", i=p, j=p)
    mean = colours[patches].mean(axis=(1, 2))                           # (n, 3)
    paper = FancyBboxPatch((342, top), 848, 306, facecolor=PAPER, edgecolor="none",
                           boxstyle="round,pad=0,rounding_size=12", zorder=-1)
    ax.add_patch(paper)
    y = top + 22
    text(ax, 358, y, title, 14.5, align="left", weight="bold")
    text(ax, 1176, y, note, 12.5, ORANGE, "right", weight="bold")
    draw_patches(ax, 364, top + 124, p, mean)
    draw_sequence(ax, top, p, patches, mean, colours, name, slots, pitch)
    if p > 1:
        targets = "all 4 codes of the next patch, from one output (Eq. 3)"
        inputs = "the class, then patches 0 to 14, one place later (Eq. 2)"
    else:
        targets = "the next code"
        inputs = "the class, then codes 0 to 62"
    label(ax, 546, top + 53, "Targets:", targets)
    label(ax, 546, top + 284, "Inputs:", inputs)


def draw_patches(ax, x, y, p, mean):
    """The grid of patches, each in the mean colour of its codes"""
    if p > 1:
        text(ax, x + 66, y - 33, "each patch: mean", 12)
        text(ax, x + 66, y - 14, "of 4 embeddings", 12)
    else:
        text(ax, x + 66, y - 33, "each code: its", 12)
        text(ax, x + 66, y - 14, "own embedding", 12)
    grid = 8 // p
    cell = 132 / grid
    for i in range(grid * grid):
        row = i // grid
        column = i % grid
        number = i if p > 1 else ""
        tile(ax, x + column * cell, y + row * cell, cell, mean[i], number, 11.5)
    frame(ax, x, y, 132, line=1.0)
    if p > 1:
        highlight(ax, x + cell, y, cell)
    arrow(ax, (x + 139, y + 117), (x + 172, y + 117), line=2)


def draw_sequence(ax, top, p, patches, mean, colours, name, slots, pitch):
    """Inputs, transformer and targets of the first positions (`slots` of them) and of the last"""
    left = 546
    right = 1176
    y_target = top + 99                                                 # its middle
    y_box = top + 151                                                   # its upper edge
    y_input = top + 241                                                 # its middle
    positions = list(range(slots))
    centres = [left + pitch * (i + 0.5) for i in positions]
    positions.append(len(patches) - 1)
    centres.append(right - pitch / 2)
    for i, x in zip(positions, centres):
        # The first input is the class, every other one the patch before the target.
        half = 25 if p > 1 and i > 0 else 19
        y = y_input - half
        if i == 0:
            ax.add_patch(Rectangle((x - 29, y), 58, 2 * half, facecolor=CLASS_COLOUR,
                                   edgecolor=INK, linewidth=1.2))
            text(ax, x, y_input, name, 11)
        elif p > 1:
            tile(ax, x - half, y, 2 * half, mean[i - 1], i - 1, 14, INK, 1.6)
        else:
            block(ax, x - half, y, 2 * half, patches[i - 1], colours, 11)
        arrow(ax, (x, y), (x, y_box + 46))

        # The target: the codes of a patch.
        cell = 28 if p > 1 else 36
        font = 10 if p > 1 else 11
        corner = cell * p / 2
        arrow(ax, (x, y_box), (x, y_target + corner + 2))
        block(ax, x - corner, y_target - corner, cell, patches[i], colours, font)
        if p > 1 and i == 1:
            highlight(ax, x - corner, y_target - corner, 2 * corner)
        if p > 1 and i == 2:
            highlight(ax, x - half, y, 2 * half)

    dots = (centres[-2] + centres[-1]) / 2
    text(ax, dots, y_target, "· · ·", 17)
    text(ax, dots, y_input, "· · ·", 17)
    box(ax, left, y_box, right - left, 44, "transformer",
        "each position sees itself and those before it")


def main(path=PICTURE):
    codes, image, colours, name = load()
    plt.rcParams["font.family"] = "DejaVu Sans"
    width = 1200
    height = 664
    figure = plt.figure(figsize=(width / 100, height / 100), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))

    draw_tokenizer(ax, codes, image, colours, name)
    arrow(ax, (289, 420), (338, 262), line=2)
    arrow(ax, (289, 500), (338, 500), line=2)
    draw_stage(ax, 12, 2, codes, colours, name, 6, 84,
               "Training starts on patches, p = 2", "16 positions: about ¼ of the work")
    draw_stage(ax, 346, 1, codes, colours, name, 8, 66,
               "Training ends on single codes, p = 1", "64 positions, the same weights")

    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_aspect("equal")
    ax.axis("off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
