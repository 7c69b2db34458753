"""Draw samples.png or faces.png of README.md from the pictures that npp.py left in a run's folder

    python npp.py && python data/pictures/samples.py out/tiny data/pictures/samples.png
    python npp.py --data data/faces --out out/faces \\
        && python data/pictures/samples.py out/faces data/pictures/faces.png
"""

import math
import os
import sys

from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import tokenizer  # noqa: E402

TITLES = {"samples_p2.png": "halfway: trained on 2 x 2 patches only",
          "samples.png": "at the end: trained on single codes too"}
NAMES, TITLE, GAP = 130, 44, 26    # pixels: least width of names, height of titles, between grids


def main(run, path):
    names = tokenizer.load_file(os.path.join(run, "ckpt.pt"))["classes"]
    grids = {title: Image.open(os.path.join(run, file)) for file, title in TITLES.items()}
    width, height = next(iter(grids.values())).size
    font = ImageFont.load_default(24)
    left = max([NAMES] + [math.ceil(font.getlength(name)) + 24 for name in names])
    picture = Image.new("RGB", (left + 2 * width + GAP, TITLE + height), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, grid) in enumerate(grids.items()):
        x = left + i * (width + GAP)
        picture.paste(grid, (x, TITLE))
        draw.text((x + width / 2, TITLE / 2 - 2), title, "black", font, anchor="mm")
    for i, name in enumerate(names):
        y = TITLE + (i + 0.5) * height / len(names)
        draw.text((left - 12, y), name, "black", font, anchor="rm")
    picture.save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
