"""Emoji as a data set: a folder with one sub-folder of PNGs for each of Unicode's nine groups

    apt-get install fonts-noto-color-emoji unicode-data
    python data/emoji/prepare.py out/emoji                           # 1,870 pictures, 32 x 32
    python data/emoji/prepare.py data/emoji/sample.npz --every 10    # is committed

Skin tones are left out: they repeat many of "People" five times. Pillow needs raqm, which joins
several code points into one picture; its wheels have it.
"""

import os
import re
import sys
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from tokenizer import Parser, replace_file, require, run_program

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # its only one
TABLE = "/usr/share/unicode/emoji/emoji-test.txt"


def read_table(path):
    """Unicode's emoji-test.txt -> [(group, text of the emoji, its name)]"""
    emoji = []
    group = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith("# group: "):
                group = line.split()[2]  # "Food & Drink": Food
            found = re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E\S+ (.*)", line)
            if found and "skin tone" not in found[2]:
                text = "".join(chr(int(x, 16)) for x in found[1].split())
                emoji.append((group, text, found[2]))
    return emoji


def render(text, font, size):
    """One emoji in the middle of a white square -> PIL image"""
    left, top, right, bottom = font.getbbox(text)
    edge = max(right - left, bottom - top)
    picture = Image.new("RGB", (edge, edge), "white")
    corner = ((edge - right - left) // 2, (edge - bottom - top) // 2)
    ImageDraw.Draw(picture).text(corner, text, font=font, embedded_color=True)
    return picture.resize((size, size), Image.LANCZOS)


def save_folder(path, pictures, chosen):
    """path/GROUP/0000-name.png: the number keeps Unicode's order, and names apart"""
    for i, (picture, (group, _, name)) in enumerate(zip(pictures, chosen)):
        name = f"{i:04}-" + re.sub(r"\W+", "-", name).strip("-")
        os.makedirs(os.path.join(path, group), exist_ok=True)
        picture.save(os.path.join(path, group, f"{name}.png"))


def prepare(out, size, every):
    require(features.check("raqm"), "this Pillow cannot join code points, expected one with raqm")
    for path in (FONT, TABLE):
        require(os.path.exists(path), f"{path}: not found, install the package named in --help")
    is_new = not os.path.isdir(out) or not os.listdir(out)
    require(is_new, f"{out}: not empty, expected a new folder")
    font = ImageFont.truetype(FONT, FONT_SIZE)
    emoji = read_table(TABLE)
    classes = sorted({group for group, _, _ in emoji})
    chosen = []
    for name in classes:
        members = [one for one in emoji if one[0] == name]
        chosen.extend(members[::every])
    pictures = [render(text, font, size) for _, text, _ in chosen]
    if out.endswith(".npz"):
        labels = np.array([classes.index(group) for group, _, _ in chosen])
        write = partial(np.savez_compressed, arr_0=np.stack(pictures), classes=classes,
                        labels=labels)
        replace_file(out, write)
    else:
        save_folder(out, pictures, chosen)
    print(f"{out}: {len(pictures):,} emoji in {len(classes)} groups")


def main(argv=None):
    """-> exit code. Raises BadInput."""
    parser = Parser(description=__doc__)
    parser.add_argument("out", help="a new folder, or an .npz with arr_0, labels and classes")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th of a group")
    args = parser.parse_args(argv)
    prepare(args.out, args.size, args.every)
    return 0


if __name__ == "__main__":
    run_program(main, "prepare.py")
