"""Writes labelled pictures as a folder that experiments/own_data.py reads: 00000.jpg beside 00000.txt, ...

  python -m tools.make_photo_folder pictures.npz photos --number=2000

The .npz holds `labels` (n words) and either `images`, uint8 (n, H, W, 3), or JPEG files end to end in `data`,
uint8, with `offsets` (n + 1): where each begins. The pictures are the first of each label, the second of each,
and so on; their captions take turns in their wording.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

WORDINGS = ("a photo of {}", "a small photo of {}", "{}", "a picture of {}", "this is {}")


def with_article(noun: str) -> str:
    return ("an " if noun[:1].lower() in tuple("aeiou") else "a ") + noun


def chosen(labels: np.ndarray, number: int) -> np.ndarray:
    """Indices of `number` pictures, the first of each label, then the second of each, ..."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        turn[here] = np.arange(len(here))
    return np.argsort(turn, kind="stable")[:number]


def write(source: Path, folder: Path, number: int) -> int:
    """Writes the folder, which must not be there yet; returns how many pictures there are in it."""
    folder.mkdir(parents=True)
    with np.load(source) as arrays:
        arrays = {name: arrays[name] for name in arrays.files}
    indices = chosen(arrays["labels"], number)
    for name, i in enumerate(indices):
        picture = io.BytesIO()
        if "images" in arrays:
            Image.fromarray(arrays["images"][i]).save(picture, "JPEG", quality=95)
        else:
            start, stop = arrays["offsets"][i : i + 2]
            picture.write(arrays["data"][start:stop])
        (folder / f"{name:05d}.jpg").write_bytes(picture.getvalue())
        noun = with_article(str(arrays["labels"][i]))
        (folder / f"{name:05d}.txt").write_text(WORDINGS[name // 10 % len(WORDINGS)].format(noun) + "\n")
    return len(indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help=".npz of labelled pictures")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--number", type=int, default=2000)
    args = parser.parse_args()
    print(f"{write(args.source, args.folder, args.number)} pictures in {args.folder}")


if __name__ == "__main__":
    main()
