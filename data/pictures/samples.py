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
NAMES = 130    # pixels: the least width of the names
TITLE = 44     # the height of the titles
GAP = 26       # between the grids


def main(run, path):
    with tokenizer.reading(os.path.join(run, "ckpt.pt"), "a checkpoint of npp.py") as saved:
        names = saved["classes"]
    grids = [Image.open(os.path.join(run, file)) for file in TITLES]
    width, height = grids[0].size
    font = ImageFont.load_default(24)
    left = NAMES
    for name in names:
        left = max(left, math.ceil(font.getlength(name)) + 24)

    size = (left + 2 * width + GAP, TITLE + height)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    x = left
    for grid, title in zip(grids, TITLES.values()):
        picture.paste(grid, (x, TITLE))
        draw.text((x + width / 2, TITLE / 2 - 2), title, "black", font, anchor="mm")
        x += width + GAP
    for i, name in enumerate(names):
        y = TITLE + (i + 0.5) * height / len(names)
        draw.text((left - 12, y), name, "black", font, anchor="rm")
    picture.save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
