"""Rows that are decoded, and the text on them. A row goes on in LM mode until BOI; then it is another file's to
draw an image on it (transfusion.py, chameleon.py), with its EOI; and LM mode goes on, until EOS.

Text is written with keys and values kept (cache.py): a stretch of it begins with one pass over the rows, then
each token costs one position. Several prompts go at once, each in its own row; a row's draws depend on the
seed, its own number and position only: never on its neighbours, nor on how many prompts go at once.

Compiled functions take as static what makes another program, and all else as arrays: another temperature
compiles nothing anew.

B rows, T positions of the buffer, I image slots, N patches or codes per image, h w c latent.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.data import layout
from tfusion.errors import UserError
from tfusion.inference import cache
from tfusion.models.attention import Cache
from tfusion.models.language import LanguageModel
from tfusion.models.masks import Sight, row_sight
from tfusion.sharding import fetch
from tfusion.types import BOS, EOS, PAD

WRITE, DRAW, DONE = 0, 1, 2  # a row's mode
TEXT_STREAM, IMAGE_STREAM = 0, 1


class Rows(NamedTuple):
    """Unfinished documents, one per row, each starting at position 0."""

    tokens_BT: jax.Array
    image_ids_BT: jax.Array
    length_B: jax.Array  # positions in use
    latents_BIhwc: jax.Array  # empty where images are codes
    image_start_BI: jax.Array  # T = unused slot
    mode_B: jax.Array
    key_B: jax.Array


def vocabulary(model: LanguageModel) -> layout.Vocabulary:
    m = model.cfg
    return layout.Vocabulary(m.text_vocab_size, m.num_patches, m.vocab_size - m.text_vocab_size - 2)


def sight(model: LanguageModel, rows: Rows) -> Sight:
    """Of whole rows: one document each, the rest padding."""
    B, T = rows.tokens_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = (positions < rows.length_B[:, None]).astype(jnp.int32)
    return row_sight(positions, segments, rows.image_ids_BT * segments, model.cfg.image_attention)


def start_rows(cfg, prompts: list, seed: int, max_len: int, first_row: int = 0) -> Rows:
    """Lays prompts out as rows. A prompt is a list of Parts; text that ends with BOI starts the row with
    an image. Its draws are keyed by (seed, its number), counted from first_row. Raises UserError where a
    prompt does not fit.
    """
    B, T, I = len(prompts), max_len, cfg.rows.image_slots
    tokens, image_ids = np.full((B, T), PAD, np.int32), np.zeros((B, T), np.int32)
    latents = np.zeros((B, I, *cfg.rows.latent_shape), np.float32)
    starts, lengths = np.full((B, I), T, np.int32), np.zeros(B, np.int32)
    for row, prompt in enumerate(prompts):
        ids, images = layout.begin(cfg.vocabulary, prompt)
        pictures = [part.values for part in prompt if part.kind == "image"]
        if len(pictures) > I:
            raise UserError(f"prompt {row} has more images than the {I} that a row has slots for")
        if len(pictures) == I and ids[-1] == cfg.vocabulary.boi:
            raise UserError(f"prompt {row} has {I} images already, as many as a row has slots for")
        if len(ids) > T:
            raise UserError(f"prompt {row} is {len(ids)} positions long, there is room for {T}: shorten it")
        tokens[row, : len(ids)], image_ids[row, : len(ids)], lengths[row] = ids, images, len(ids)
        for slot, picture in enumerate(pictures):
            if not cfg.vocabulary.num_codes:
                latents[row, slot] = picture
            starts[row, slot] = np.argmax(images == slot + 1)
    last = tokens[np.arange(B), lengths - 1]
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first_row + jnp.arange(B))
    return Rows(*map(jnp.asarray, (tokens, image_ids, lengths, latents, starts,
                                   np.where(last == cfg.vocabulary.boi, DRAW, WRITE))), keys)


def read(model: LanguageModel, params, rows: Rows) -> Cache:
    """Keys and values of the rows as they are, their images finished."""
    x_BTD = model.apply({"params": params}, rows.tokens_BT, rows.image_start_BI, rows.latents_BIhwc,
                        method="embed_rows")
    return cache.prefill(model, params, x_BTD, sight(model, rows))[1]


def keys(rows: Rows, stream: int, number_B):
    """A key for each row's draw of that number, of text or of images."""
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, stream), n))(rows.key_B, number_B)


def _next_tokens(model: LanguageModel, logits_BV, rows: Rows, temperature):
    """One text token per row: greedy at temperature 0. Never pad, bos, eoi, a code, nor BOI without room."""
    T, ids, known = rows.tokens_BT.shape[1], jnp.arange(logits_BV.shape[1]), vocabulary(model)
    never = (ids == PAD) | (ids == BOS) | (ids >= known.eoi)
    full = (rows.length_B + known.num_patches + 2 > T) | (rows.image_start_BI < T).all(axis=1)
    logits = jnp.where(never | ((ids == known.boi) & full[:, None]), -jnp.inf, logits_BV)
    key_B = keys(rows, TEXT_STREAM, rows.length_B)
    drawn = jax.vmap(jax.random.categorical)(key_B, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def append(rows: Rows, tokens_B, where_B) -> Rows:
    """Appends one token to the chosen rows."""
    index = jnp.where(where_B, rows.length_B, rows.tokens_BT.shape[1])
    tokens = rows.tokens_BT.at[jnp.arange(len(index)), index].set(tokens_B, mode="drop")
    return rows._replace(tokens_BT=tokens, length_B=rows.length_B + where_B)


@partial(jax.jit, static_argnums=0)
def write_text(model: LanguageModel, params, rows: Rows, limit_B, temperature) -> Rows:
    """LM mode: every row writes until BOI (then its mode is DRAW), EOS or its limit (then DONE)."""

    def writing(state):
        return jnp.any(state[0].mode_B == WRITE)

    def body(state):
        rows, kept = state
        at, writes = rows.length_B - 1, rows.mode_B == WRITE  # a text token, BOS, EOI or BOI: never a patch
        h_BD, kept = cache.step(model, params, kept, rows.tokens_BT[jnp.arange(len(at)), at], at)
        logits_BV = model.apply({"params": params}, h_BD, method="logits")
        token = _next_tokens(model, logits_BV, rows, temperature)
        rows = append(rows, token, writes)
        ended = (token == EOS) | (rows.length_B >= limit_B)
        mode = jnp.where(token == vocabulary(model).boi, DRAW, jnp.where(ended, DONE, WRITE))
        return rows._replace(mode_B=jnp.where(writes, mode, rows.mode_B)), kept

    def write(rows: Rows) -> Rows:
        return jax.lax.while_loop(writing, body, (rows, read(model, params, rows)))[0]

    rows = rows._replace(mode_B=jnp.where((rows.mode_B == WRITE) & (rows.length_B >= limit_B), DONE,
                                          rows.mode_B))
    return jax.lax.cond(writing((rows,)), write, lambda rows: rows, rows)


def with_new_image(rows: Rows, num_patches: int):
    """(rows with N patches appended to those that draw, the slot each draws in)."""
    B, T = rows.tokens_BT.shape
    drawing, position = rows.mode_B == DRAW, jnp.arange(T)[None]
    slot_B = jnp.argmax(rows.image_start_BI == T, axis=1)
    start, end = rows.length_B[:, None], rows.length_B[:, None] + num_patches
    new = drawing[:, None] & (position >= start) & (position < end)
    starts = rows.image_start_BI.at[jnp.arange(B), slot_B].set(
        jnp.where(drawing, rows.length_B, rows.image_start_BI[jnp.arange(B), slot_B]))
    return rows._replace(
        image_ids_BT=jnp.where(new, slot_B[:, None] + 1, rows.image_ids_BT), image_start_BI=starts,
        length_B=rows.length_B + num_patches * drawing), slot_B


def generate(cfg, params, prompts: list, model: LanguageModel, draw: Callable, *, seed: int = 0,
             first_row: int = 0, max_new_tokens: int | None = None, max_images: int | None = None,
             temperature: float = 0.0, max_len: int | None = None) -> list:
    """Continues each prompt to its EOS; returns one list of new parts per prompt.

    prompts: see `start_rows`. draw: (rows) -> rows, of which those in mode DRAW got an image and its EOI, and
    are back in LM mode. Texts returned are without specials. Raises UserError where a row has no room.
    max_new_tokens limits a row's new text and max_images its new images; max_len the whole row
    (data.seq_len unless given, and at most). first_row is the number of the first prompt where these are some
    of many: each has draws of its own, the same however they are split.
    """
    N, max_len = cfg.model.num_patches, max_len or model.seq_len
    if max_len > model.seq_len:
        raise UserError(f"max_len = {max_len} positions are more than the data.seq_len = {model.seq_len} that "
                        "the model knows: ask for a shorter document")
    rows = start_rows(cfg, prompts, seed, max_len, first_row)
    T = rows.tokens_BT.shape[1]
    begin, budget = np.asarray(rows.length_B), T if max_new_tokens is None else max_new_tokens
    limit, images = jnp.minimum(begin + budget, T), 0
    while True:
        rows = write_text(model, params, rows, limit, jnp.float32(temperature))
        mode, length = fetch((rows.mode_B, rows.length_B))
        if not (mode == DRAW).any() or images == max_images:
            break
        room = length[mode == DRAW].max() + N + 1
        if room > T:
            raise UserError(f"no room for an image: {room} positions are needed, there are {T}")
        limit = jnp.where(rows.mode_B == DRAW, jnp.minimum(limit + N + 1, T), limit)
        rows = draw(rows)
        images += 1
    rows = fetch(rows._replace(key_B=None))
    return [new_parts(cfg, jax.tree.map(lambda x, i=i: x[i], rows), int(begin[i])) for i in range(len(prompts))]


def new_parts(cfg, row: Rows, begin: int) -> list:
    """What one row (of numpy, without the batch axis) holds beyond its prompt, as parts in order."""
    tokens, ids, images = row.tokens_BT, row.image_ids_BT, cfg.rows.layout.images(row)
    parts, ids_here = [], []

    def end_text():
        if ids_here:
            parts.append(layout.text(ids_here))
            ids_here.clear()

    for position in range(begin, int(row.length_B)):
        if ids[position] and (position == begin or ids[position] != ids[position - 1]):
            end_text()
            parts.append(layout.image(images[ids[position] - 1]))
        elif not ids[position] and tokens[position] not in (EOS, cfg.vocabulary.boi, cfg.vocabulary.eoi):
            ids_here.append(int(tokens[position]))
    end_text()
    return parts
