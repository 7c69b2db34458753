"""Draw samples.png of README.md from the pictures that `python npp.py` left in the folder of a run

    python data/pictures/samples.py out/tiny [FOLDER]
"""

import os
import sys

from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

import npp  # noqa: E402

TITLES = {"samples_p2.png": "halfway: trained on 2 x 2 patches only",
          "samples.png": "at the end: trained on single codes too"}
NAMES, TITLE, GAP = 130, 44, 26    # pixels: width of the names, height of the titles, between grids


def main(run, folder=HERE):
    names = npp.Codes(os.path.join(ROOT, "data", "fashion")).meta["classes"]
    grids = {title: Image.open(os.path.join(run, file)) for file, title in TITLES.items()}
    width, height = next(iter(grids.values())).size
    picture = Image.new("RGB", (NAMES + 2 * width + GAP, TITLE + height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(24)
    for i, (title, grid) in enumerate(grids.items()):
        x = NAMES + i * (width + GAP)
        picture.paste(grid, (x, TITLE))
        draw.text((x + width / 2, TITLE / 2 - 2), title, "black", font, anchor="mm")
    for i, name in enumerate(names):
        y = TITLE + (i + 0.5) * height / len(names)
        draw.text((NAMES - 12, y), name, "black", font, anchor="rm")
    picture.save(os.path.join(folder, "samples.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
