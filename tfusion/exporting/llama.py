"""The transformer in Hugging Face's Llama layout, and beside it, in tfusion/, what is not a Llama.

V vocabulary.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from tfusion import config, distributed, exported, sharding
from tfusion.errors import UserError
from tfusion.exporting import parity, readme
from tfusion.exporting.base import Export, copy_parts, difference, said
from tfusion.models import llama
from tfusion.objectives import kind_of
from tfusion.workdir import copy_in

FILE_BYTES = 2**31  # of one file, and so of memory, at most; a tensor that is larger has a file of its own


def check(cfg: config.RunConfig, where) -> None:
    """Raises UserError where the kind of training has no such form, or the model is no Llama."""
    form = kind_of(cfg).llama(cfg)
    if form is None:
        raise UserError(f"{where} holds a run with objective = '{cfg.objective}', which has no transformer in "
                        "Llama's form: export it with --format=orbax")
    llama.check_model(form.model)


def write(export: Export, folder: Path) -> list[str]:
    """Raises UserError where the model has what a Llama has not, or the files are another function than it."""
    form, leaves = kind_of(export.run.cfg).llama(export.run.cfg), flatten_dict(export.run.params, sep="/")
    llama.check_leaves(leaves)
    ours, about = folder / exported.OURS, llama.to_config(form, export.dtype)
    if distributed.is_writer():
        ours.mkdir()
        config.save(export.run.cfg, ours)
        copy_parts(export, ours)
        if (tokenizer := export.run.tokenizer) and not tokenizer.shift:  # the rows are by its model's own ids
            copy_in([ours / "tokenizer.model"], folder)
        _write_json(folder / "config.json", about)
        (folder / "README.md").write_text(readme.llama(export, form))
    write_tensors(folder, exported.MODEL, _theirs(leaves, form))
    write_tensors(ours, exported.ADAPTER, [
        (leaf.replace("/", "."), x.shape, x.dtype, partial(sharding.fetch, x)) for leaf, x in leaves.items()
        if not llama.tensors_of(leaf, 1)])
    distributed.wait_for_all()
    round_trip = _round_trip(folder, leaves, form)
    apart, size = parity.compare(exported.Tensors(folder), about, form, export.run.params)
    if round_trip or not apart <= parity.TOLERANCE * max(size, 1.0):
        raise UserError(f"the files in {folder} are another function than the run: read back they differ by "
                        f"{round_trip:.3g}, Llama's text logits by {apart:.3g} of {size:.3g}; export it with "
                        "--format=orbax")
    return [*said(export, round_trip), f"text logits of Llama's definition on these files: the largest "
            f"difference is {apart:.3g}, the largest logit {size:.3g}"]


def _theirs(leaves: dict, form: llama.Form) -> Iterator:
    """(name, shape, dtype, function that gives it, numpy) of each tensor, in their order."""
    def give(x, tensor):
        x = x if tensor.layer is None else _layer(x, tensor.layer)
        return llama.to_llama(sharding.fetch(x), tensor, form.vocab_size)

    for tensor in llama.tensors(form.model.num_layers):
        x = leaves[tensor.leaf]
        yield (tensor.name, llama.shape_there(x.shape, tensor, form.vocab_size), x.dtype,
               partial(give, x, tensor))


@jax.jit
def _layer(x, layer):
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def write_tensors(folder: Path, stem: str, tensors: Iterable) -> None:
    """One file, or, past FILE_BYTES, several and an index; on the host there is one file's worth at a time.
    Every process gives its parts, the first writes.
    """
    files, sizes = [[]], [0]
    for one in tensors:
        size = int(np.prod(one[1])) * one[2].itemsize
        if sizes[-1] and sizes[-1] + size > FILE_BYTES:
            files.append([])
            sizes.append(0)
        files[-1].append(one)
        sizes[-1] += size
    names = [f"{stem}.safetensors"] if len(files) == 1 else [
        f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for name, held in zip(names, files):
        arrays = {}
        for key, _, _, get in held:
            x = get()
            if distributed.is_writer():
                arrays[key] = np.ascontiguousarray(x)  # else its bytes would be written in another order
        if arrays:
            save_file(arrays, folder / name, metadata={"format": "pt"})  # which transformers looks for
    if len(files) > 1 and distributed.is_writer():
        where = {one[0]: name for name, held in zip(names, files) for one in held}
        _write_json(folder / f"{stem}.safetensors.index.json",
                    {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _round_trip(folder: Path, leaves: dict, form: llama.Form) -> float:
    """The largest difference between the parameters and those of a run that is started from these files."""
    theirs, beside = exported.Tensors(folder), exported.Tensors(folder / exported.OURS, exported.ADAPTER)
    largest = 0.0
    for leaf, x in leaves.items():
        if llama.tensors_of(leaf, 1):
            back = exported.read_leaf(theirs, leaf, x, form, (0, form.vocab_size))
        else:
            back = exported.read_beside(beside, leaf, x)
        largest = max(largest, difference(back, x))
        back.delete()
    return distributed.largest(largest)
