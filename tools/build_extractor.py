"""Trains the extractor of evals/frechet.py anew: `python -m tools.build_extractor` (for maintainers).

A minute on two cores. It learns which sprites a scene holds and the colour of its canvas, from scenes of the
training split alone, of a world of all sprites; every picture is softened or made noisy half of the time, as
pictures of models are. The bytes are the same on a machine of the same kind with the versions of
requirements.txt; other processors round otherwise, and then the sha256 that it prints goes into
evals/frechet.py, and figures made with the former one are not comparable.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from tfusion.data import packs
from tfusion.data.scenes import CANVASES, NOUNS, World, make_scene, render
from tfusion.evals.frechet import EXTRACTOR, Extractor
from tfusion.models.codecs.network import to_unit

SEED = 2  # of the scenes: 0 and 1 are what models are trained and measured on
SCENES, STEPS, BATCH, PEAK = 16_384, 1_200, 128, 3e-3
CHECKED = 2_048  # held-out scenes
MIXES = (0.15, 0.7, 0.15)


def scenes(n: int, held_out: bool):
    """(pictures uint8 (n, H, W, 3), whether each noun is there (n, K), canvas (n,))."""
    world = World(num_sprites=len(NOUNS), jitter=2)
    made = [make_scene(world, SEED, i, held_out) for i in range(n)]
    nouns = np.array([[noun in scene.nouns for noun in NOUNS] for scene in made], np.float32)
    canvases = np.array([list(CANVASES).index(scene.canvas) for scene in made])
    return np.stack([render(world, scene) for scene in made]), nouns, canvases


def spoil(key, x_BHWC):
    """A quarter of the pictures softened, a quarter noisy."""
    which, noise = jax.random.split(key)
    soft = x_BHWC
    for axis in (1, 2):
        soft = sum(w * jnp.roll(soft, s, axis) for w, s in zip(MIXES, (-1, 0, 1)))
    noisy = x_BHWC + 0.1 * jax.random.normal(noise, x_BHWC.shape)
    u = jax.random.uniform(which, (len(x_BHWC), 1, 1, 1))
    return jnp.where(u < 0.25, soft, jnp.where(u < 0.5, noisy, x_BHWC))


def loss(params, images, nouns, canvases):
    _, noun_logits, canvas_logits = Extractor().apply({"params": params}, images)
    presence = optax.sigmoid_binary_cross_entropy(noun_logits, nouns).sum(-1).mean()
    return presence + optax.softmax_cross_entropy_with_integer_labels(canvas_logits, canvases).mean()


def train() -> dict:
    images, nouns, canvases = scenes(SCENES, held_out=False)
    tx = optax.adam(optax.cosine_decay_schedule(PEAK, STEPS))
    key = jax.random.key(SEED)
    params = Extractor().init(key, to_unit(images[:1]))["params"]
    state = tx.init(params)

    @jax.jit
    def step(params, state, step, images, nouns, canvases):
        x = spoil(jax.random.fold_in(key, step), to_unit(images))
        value, grads = jax.value_and_grad(loss)(params, x, nouns, canvases)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(SEED)
    for i in range(STEPS):
        chosen = rng.integers(SCENES, size=BATCH)
        params, state, value = step(params, state, i, images[chosen], nouns[chosen], canvases[chosen])
        if i % 200 == 0 or i == STEPS - 1:
            print(f"step {i}: loss {float(value):.4f}", flush=True)
    return params


def check(params: dict) -> None:
    """Prints how often it names exactly the sprites, and the canvas, of held-out scenes."""
    images, nouns, canvases = scenes(CHECKED, held_out=True)
    _, noun_logits, canvas_logits = jax.jit(
        lambda x: Extractor().apply({"params": params}, to_unit(x)))(images)
    exact = ((np.asarray(noun_logits) > 0) == (nouns > 0)).all(-1).mean()
    print(f"held out: exactly the sprites {exact:.4f}, "
          f"the canvas {(np.argmax(canvas_logits, -1) == canvases).mean():.4f}")


def content(params: dict) -> bytes:
    """An .npz without times in it: float16, as small as it is exact enough."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in sorted(flatten_dict(params, sep="/").items()):
            array = io.BytesIO()
            np.save(array, np.asarray(value, np.float16))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(packs.__file__).parent / EXTRACTOR
    parser.add_argument("--output", type=Path, default=default, help="npz file to write")
    args = parser.parse_args()
    params = jax.tree.map(lambda x: np.float32(np.float16(x)), train())
    check(params)
    args.output.write_bytes(content(params))
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB, "
          f"sha256 {hashlib.sha256(args.output.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
