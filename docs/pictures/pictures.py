"""Draw the pictures of the pages, from committed data: `python docs/pictures/pictures.py` (`make pictures`).

    python docs/pictures/pictures.py                      all of them, into this folder
    python docs/pictures/pictures.py steps --out FOLDER   some, into another
    python docs/pictures/pictures.py steps --caption      print what is said below it; pages have that between two comments
    python docs/pictures/pictures.py --write              all pictures, and all captions in their pages

A picture is what it shows (numbers of result files, of the codec, or of keys.json) and a function that draws that. Each file
names the digest of what it shows, so that a test can tell that one is older than its data without comparing pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

import pictures_explained
import pictures_measured

HERE = Path(__file__).parent

# Type no smaller than 8.5 points in pictures 4.8 inches wide: some 10 pixels of height where a page is 400 pixels wide.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "turboquant",
}


@dataclass(frozen=True)
class Picture:
    """What a picture shows, who draws it, and what is said below it, numbers included."""

    show: Callable[[], dict[str, Any]]
    draw: Callable[[dict[str, Any]], Figure]
    caption: Callable[[dict[str, Any]], str]


PICTURES = {
    "steps": Picture(pictures_measured.steps, pictures_measured.draw_steps, pictures_measured.say_steps),
    "vllm": Picture(pictures_measured.vllm, pictures_measured.draw_vllm, pictures_measured.say_vllm),
    "quality": Picture(pictures_measured.quality, pictures_measured.draw_quality, pictures_measured.say_quality),
    "decode": Picture(pictures_measured.decode, pictures_measured.draw_decode, pictures_measured.say_decode),
    "roofline": Picture(pictures_measured.roofline, pictures_measured.draw_roofline, pictures_measured.say_roofline),
    "levels": Picture(pictures_explained.levels, pictures_explained.draw_levels, pictures_explained.say_levels),
    "offset": Picture(pictures_explained.offset, pictures_explained.draw_offset, pictures_explained.say_offset),
    "tile": Picture(pictures_explained.tile, pictures_explained.draw_tile, pictures_explained.say_tile),
}


def digest(data: dict[str, Any]) -> str:
    """A name for exactly these numbers."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def make(name: str, folder: Path) -> Path:
    """Draw one picture."""
    picture = PICTURES[name]
    data = picture.show()
    path = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(data)
        figure.savefig(path, metadata={"Date": None, "Description": digest(data)}, bbox_inches="tight", pad_inches=0.06)
    return path


def caption(name: str, page: str = "") -> str:
    """What is said below a picture, in a page of that name."""
    picture = PICTURES[name]
    text = re.sub(rf"\[\w+\]\({re.escape(page)}\), ", "", picture.caption(picture.show()))
    return textwrap.fill(text, 128, break_on_hyphens=False, break_long_words=False)


def fill(page: Path) -> str:
    """A page with every caption made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{caption(match[2], page.name)}\n{match[3]}"

    pattern = r"(<!-- python docs/pictures/pictures\.py (\w+) --caption -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replace, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="all by default")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--caption", action="store_true", help="print captions, draw nothing")
    parser.add_argument("--write", action="store_true", help="put captions into the pages, too")
    options = parser.parse_args()
    if options.caption:
        print(*map(caption, options.names or PICTURES), sep="\n\n")
        return
    if options.write:
        for page in HERE.parent.glob("*.md"):
            page.write_text(fill(page), encoding="utf-8")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        print(make(name, options.out))


if __name__ == "__main__":
    main()
