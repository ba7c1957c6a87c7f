"""Rebuilds the shipped emoji pack: `python -m tools.build_emoji` (for maintainers).

Needs `npm` on the path and `pip install resvg-py==0.5.0`; takes about a minute on one core. The
SVG sets and their names are downloaded with `npm pack`, checked against the sha256 below, and
rendered with alpha to lossless WebP. Skin-tone variants are left out.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tfusion.data import packs

NAMES = "emojibase-data"
PACKAGES = {  # npm package: (version, sha256 of the tarball)
    "@iconify-json/noto": (
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "@iconify-json/fluent-emoji": (
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    NAMES: ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}
STYLES = ("fluent-emoji-flat", "fluent-emoji", "noto")
# The gradient set has no table of code points; its icons are named as those of the flat set.
CHARS = {"fluent-emoji": "fluent-emoji-flat"}
SIZE = 64
COMPONENTS = 2  # emojibase's group of skin tones and hair styles, which are not pictures


def download(package: str, folder: Path) -> dict[str, Any]:
    """Fetches one npm package and returns its JSON files, keyed by path inside the package.

    Raises:
      ValueError: the tarball is not the one this script was written for.
    """
    version, sha256 = PACKAGES[package]
    command = ["npm", "pack", f"{package}@{version}", "--silent", "--pack-destination", folder]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    tarball = folder / name
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{package}@{version} has sha256 {found}, expected {sha256}; "
            "check the new contents and licence, then update PACKAGES here"
        )
    files = {}
    with tarfile.open(tarball) as archive:
        for wanted in ("icons.json", "chars.json", "en/data.json"):
            if f"package/{wanted}" in archive.getnames():
                files[wanted] = json.load(archive.extractfile(f"package/{wanted}"))
    return files


def icon_name(chars: dict[str, str], hexcode: str) -> str | None:
    """The icon drawn for an emoji's code points (such as '1F3F3-FE0F'), or None."""
    code = hexcode.lower()
    return chars.get(code) or chars.get(code.replace("-fe0f", ""))


def render(icons: dict[str, Any], name: str, size: int) -> Image.Image:
    """Draws one Iconify icon as an RGBA image.

    Raises:
      ValueError: the icon came out blank.
    """
    import resvg_py  # only maintainers have it

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">'
        f"{icon['body']}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size) or not image.getbbox():
        raise ValueError(f"icon {name!r} came out {image.size} or blank; look at its SVG")
    return image


def collect(folder: Path, size: int) -> tuple[list[bytes], list[dict]]:
    """Renders every named emoji in every style: (WebP files, their meta entries)."""
    names = download(NAMES, folder)["en/data.json"]
    sets = {style: download(f"@iconify-json/{style}", folder) for style in STYLES}
    files, meta = [], []
    for style in STYLES:
        icons, chars = sets[style]["icons.json"], sets[CHARS.get(style, style)]["chars.json"]
        for emoji in sorted(names, key=lambda e: e.get("order", 0)):
            name = icon_name(chars, emoji["hexcode"])
            if name is None or emoji.get("group", COMPONENTS) == COMPONENTS:
                continue
            buffer = io.BytesIO()
            render(icons, name, size).save(buffer, "WEBP", lossless=True, quality=80, method=4)
            files.append(buffer.getvalue())
            entry = {k: emoji.get(k, []) for k in ("label", "tags", "group")}
            meta.append({"style": style} | entry)
        print(f"{style}: {sum(m['style'] == style for m in meta)} images", flush=True)
    return files, meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(packs.__file__).parent / packs.EMOJI
    parser.add_argument("--output", type=Path, default=default, help="npz file to write")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files, meta = collect(Path(folder), args.size)
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
    meta_json = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    np.savez(
        args.output,
        data=np.frombuffer(b"".join(files), np.uint8),
        offsets=offsets,
        meta=np.frombuffer(meta_json, np.uint8),
    )
    content = args.output.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    print(f"{args.output}: {len(files)} images, {len(content) / 1e6:.2f} MB, sha256 {digest}")


if __name__ == "__main__":
    main()
