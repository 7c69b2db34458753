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

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from common import BadInput, Parser, one_line_errors, write_atomically

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
TABLE = "/usr/share/unicode/emoji/emoji-test.txt"

def read_table(path):
    """Unicode's emoji-test.txt -> [(group, text of the emoji, its name)]"""
    emoji, group = [], ""
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.startswith("# group: "):
                group = line.split()[2]                                   # "Food & Drink": Food
            elif match := re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E\S+ (.*)", line):
                if "skin tone" not in match[2]:
                    text = "".join(chr(int(x, 16)) for x in match[1].split())
                    emoji.append((group, text, match[2]))
    return emoji

def render(text, font, size):
    """One emoji in the middle of a white square -> PIL image"""
    left, top, right, bottom = font.getbbox(text)
    edge = max(right - left, bottom - top)
    picture = Image.new("RGB", (edge, edge), "white")
    where = (edge - right - left) // 2, (edge - bottom - top) // 2
    ImageDraw.Draw(picture).text(where, text, font=font, embedded_color=True)
    return picture.resize((size, size), Image.LANCZOS)

def save_folder(path, pictures, chosen):
    """path/GROUP/0000-name.png: the number keeps Unicode's order, and names apart"""
    for i, (picture, (group, _, name)) in enumerate(zip(pictures, chosen)):
        name = f"{i:04}-" + re.sub(r"\W+", "-", name).strip("-")
        os.makedirs(os.path.join(path, group), exist_ok=True)
        picture.save(os.path.join(path, group, f"{name}.png"))

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", help="a new folder, or an .npz with arr_0, labels and classes")
    parser.add_flag("size", 32, "pixels a side")
    parser.add_flag("every", 1, "only each so-many-th emoji of a group")
    args = parser.parse_args(argv)
    if not features.check("raqm"):
        raise BadInput("this Pillow cannot join code points, expected one with raqm")
    for path in FONT, TABLE:
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file, expected that of the package named in --help")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise BadInput(f"{args.out}: not empty, expected a new folder")
    font, emoji = ImageFont.truetype(FONT, 109), read_table(TABLE)        # its only size
    classes = sorted({group for group, _, _ in emoji})
    chosen = [e for c in classes for e in [e for e in emoji if e[0] == c][:: args.every]]
    pictures = [render(text, font, args.size) for _, text, _ in chosen]
    if args.out.endswith(".npz"):
        arrays = dict(arr_0=np.stack(pictures), classes=classes,
                      labels=np.array([classes.index(group) for group, _, _ in chosen]))
        write_atomically(args.out, lambda f: np.savez_compressed(f, **arrays))
    else:
        save_folder(args.out, pictures, chosen)
    print(f"{args.out}: {len(pictures):,} emoji in {len(classes)} groups")
    return 0

if __name__ == "__main__":
    sys.exit(main())
