"""What `python -m tfusion.export` makes, for who reads it: `inference` opens an Orbax export like a run, and
training starts from a folder in Llama's layout, an export or not.

    export.json     what the export is (MARK); stands in both
    orbax           as a run: config.json, tokenizer, codec.npz, checkpoints/<step>/{params,buffers,meta},
                    frozen/
    llama           model.safetensors, or several and an index; config.json; and, of an export, tfusion/ with
                    all that is not a Llama: adapter.safetensors, config.json, tokenizer, codec.npz
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from tfusion import paths
from tfusion.errors import UserError
from tfusion.models import llama

MARK = "export.json"
OURS = "tfusion"  # folder of a Llama export
MODEL, ADAPTER = "model", "adapter"  # stems of files of tensors


def about(folder) -> dict:
    """What an export says of itself, {} of any other folder. Raises UserError where that is broken."""
    path = paths.path(folder) / MARK
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is broken ({e}): export anew") from e


def cast(had, dtype):
    """The dtype that an array of an export has: floats are in the one that was asked for."""
    return jnp.dtype(dtype) if jnp.issubdtype(had, jnp.floating) else had


def as_saved(targets, export: dict):
    """Shapes and shardings of parameters, in the dtype in which an export has them. export: `about` of it."""
    if not export:
        return targets
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, cast(x.dtype, export["dtype"]), sharding=x.sharding), targets)


def is_llama(folder) -> bool:
    """Whether a folder holds a model in Llama's layout."""
    try:
        return json.loads((paths.path(folder) / "config.json").read_text()).get("model_type") == "llama"
    except (OSError, ValueError, AttributeError):
        return False


class Tensors:
    """The safetensors of a folder: one file, or several and their index. Read part by part, when asked for."""

    def __init__(self, folder, stem: str = MODEL):
        """Raises UserError where there are none, or a file is broken."""
        self.folder, index = Path(folder), Path(folder) / f"{stem}.safetensors.index.json"
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [
                f"{stem}.safetensors"]
            for name in names:
                if Path(name).name != name:
                    raise ValueError(f"it names {name!r}, which is no file beside it")
            files = [safe_open(self.folder / name, framework="np") for name in names]
            self._of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as e:
            raise UserError(f"{self.folder} has no tensors that can be read ({e}): {stem}.safetensors, or "
                            f"several and {index.name}, are looked for") from e

    def names(self) -> list[str]:
        return sorted(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError where there is no such tensor."""
        if name not in self._of:
            raise UserError(f"{self.folder} has no tensor {name}")
        return tuple(self._of[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()):
        """tensor[index], numpy; of the file, only that part is read."""
        whole = tuple(slice(0, size) for size in self.shape(name))
        return self._of[name].get_slice(name)[index or whole]


class Started(NamedTuple):
    params: Any
    loaded: list[str]  # leaves, '/' between the parts of their paths
    new: list[str]  # as they were initialised: leaves, or 'leaf (which rows of it)'
    left_over: list[str]  # tensors of the folder that the model has no place for


def start_from_llama(folder, form: llama.Form, params, shift: int) -> Started:
    """Parameters, placed and initialised, with the folder's values put in, leaf by leaf, each device
    reading its own part.

    params: a tree of float32 arrays, given up: each is deleted when its successor is there. shift: how far
    the run's tokenizer moved the ids of its model (Tokenizer.shift): row i of the folder's vocabulary is row
    i + shift here. An export's rows are by our ids already. Raises UserError where the model is another.
    """
    llama.check_model(form.model)
    folder = Path(folder)
    config, theirs = json.loads((folder / "config.json").read_text()), Tensors(folder)
    llama.check_config(config, form, folder / "config.json")
    adapter = Tensors(folder / OURS, ADAPTER) if (folder / OURS).is_dir() else None
    beside = {name.replace(".", "/") for name in adapter.names()} if adapter else set()
    rows, tied = _rows(config, theirs, form, shift), bool(config.get("tie_word_embeddings"))
    flat, loaded, new, used = flatten_dict(params, sep="/"), [], [], set()
    llama.check_leaves(flat)
    for leaf, old in flat.items():
        if names := names_of(leaf, form, tied):
            flat[leaf] = read_leaf(theirs, leaf, old, form, rows, tied)
            used |= set(names)
            ends = [(0, rows[0]), (rows[1], form.vocab_size)] if leaf in llama.TABLES else []
            new += [f"{leaf} (rows {a} to {b - 1})" for a, b in ends if a < b]
        elif leaf in beside:
            flat[leaf] = read_beside(adapter, leaf, old)
        else:
            new.append(leaf)
            continue
        loaded.append(leaf)
        old.delete()
    left_over = [name for name in theirs.names() if name not in used] + sorted(beside - flat.keys())
    return Started(unflatten_dict(flat, sep="/"), loaded, new, left_over)


def _rows(config: dict, theirs: Tensors, form: llama.Form, shift: int) -> tuple[int, int]:
    """Which of our rows of the vocabulary the folder's first ones are: [first, last). Raises UserError where an
    export has another vocabulary."""
    number = theirs.shape(llama.TABLES["token_embedding"])[0]
    if not form.symbols.keys() <= config.keys():
        return shift, min(shift + number, form.text_vocab_size)
    if number != form.vocab_size or any(config[name] != id_ for name, id_ in form.symbols.items()):
        raise UserError(f"{theirs.folder} has a vocabulary of {number}, the config's model one of "
                        f"{form.vocab_size}: set model.text_vocab_size")
    return 0, number


def names_of(leaf: str, form: llama.Form, tied: bool = False) -> list[str]:
    """The tensors that a leaf is made of; tied: the head is the embedding, and not stored."""
    if tied and leaf in llama.TABLES:
        return [llama.TABLES["token_embedding"]]
    return [tensor.name for tensor in llama.tensors_of(leaf, form.model.num_layers)]


def read_leaf(theirs: Tensors, leaf: str, like, form: llama.Form, rows: tuple[int, int], tied: bool = False):
    """A leaf of the transformer, with the shape, dtype and sharding of `like`, put together on the devices.

    rows: which of a vocabulary's rows are the tensor's first ones; the others stay those of `like`. Raises
    UserError where a tensor is missing or has another shape.
    """
    names, axis = names_of(leaf, form, tied), 1 if leaf.endswith("kernel") else 0
    for name, tensor in zip(names, llama.tensors_of(leaf, form.model.num_layers)):
        found = theirs.shape(name)
        if found != (want := llama.shape_there(like.shape, tensor, (*found, 0)[0])):
            raise UserError(f"{theirs.folder}: {name} is {found}, the config's model has {want}")

    def part(index):
        index = _bounds(index, like.shape)
        if leaf not in llama.TABLES:
            return llama.from_llama(leaf, index, form.model.num_layers, theirs.read).astype(like.dtype)
        first = max(index[axis].start, rows[0])
        last = max(first, min(index[axis].stop, rows[1]))
        here, there = [slice(None)] * 2, list(index)
        here[axis], there[axis] = (slice(first - at, last - at) for at in (index[axis].start, rows[0]))
        out = np.array(old[str(index)])
        if first < last:
            out[tuple(here)] = llama.from_llama(
                leaf, tuple(there), form.model.num_layers, lambda _, index: theirs.read(names[0], index))
        return out

    old = {str(_bounds(shard.index, like.shape)): shard.data for shard in like.addressable_shards}
    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _bounds(index: tuple[slice, ...], shape) -> tuple[slice, ...]:
    return tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, shape))


def read_beside(adapter: Tensors, leaf: str, like):
    """A leaf that no Llama has, of an export's other file. Raises UserError where it has another shape."""
    name = leaf.replace("/", ".")
    if adapter.shape(name) != like.shape:
        raise UserError(f"{adapter.folder}: {name} is {adapter.shape(name)}, the config's model has "
                        f"{like.shape}")
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: adapter.read(name, index).astype(like.dtype))
