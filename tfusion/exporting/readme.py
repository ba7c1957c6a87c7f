"""README.md of an export: what it holds, and the lines that read it without this package."""

from tfusion.exporting.base import Export
from tfusion.models.llama import Form

ORBAX = """# {title}

Parameters of a model trained with tfusion: {weights} weights of step {step}, {dtype}. `config.json` is the
run's config{parts}.

Read it with stock Orbax, here or on any number of devices, each array split over them where it divides:

```python
import pathlib, jax, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
path = pathlib.Path("checkpoints/{step}/params").absolute()  # from this folder
mesh = Mesh(jax.devices(), ("x",))
def place(x):  # along its first axis that divides
    split = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0][:1]
    spec = PartitionSpec(*["x" if axis in split else None for axis in range(len(x.shape))])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
reader = ocp.StandardCheckpointer()
params = reader.restore(path, jax.tree.map(place, reader.metadata(path).item_metadata.tree))
```

`params` is a tree of dicts. With tfusion, `sample` and `evaluate` take this folder as `--workdir`.
"""

LLAMA = """# {title}

The transformer of a model trained with tfusion: {weights} weights of step {step}, {dtype}. Text alone, after
`pip install transformers torch sentencepiece protobuf`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".")  # from this folder
{tokenizer}
```

The {vocab_size} rows of the vocabulary are {text_vocab_size} ids of text (0, 1, 2 = pad, bos, eos), then
{symbols}. A document begins with bos. {ids}

`tfusion/` holds what is not a Llama: `adapter.safetensors` (between image latents and positions, in tfusion's
names and orientation, (in, out)); `config.json`, the run's config{parts}.
With tfusion, this folder starts a run: `--config.train.init_from=DIR`.
"""


def orbax(export: Export) -> str:
    return ORBAX.format(**_facts(export))


def llama(export: Export, form: Form) -> str:
    tokenizer, symbols = export.run.tokenizer, ", ".join(
        f"{number} = {name.removesuffix('_token_id').upper()}" for name, number in form.symbols.items())
    opened = ("# no AutoTokenizer: other ids, see below" if not tokenizer or tokenizer.shift else
              'tokenizer = AutoTokenizer.from_pretrained(".")  # bos is to be put before its ids')
    ids = "" if not tokenizer else (
        f"Ids are those of the tokenizer's own model, each + {tokenizer.shift}." if tokenizer.shift else
        "Ids are those of `tokenizer.model`.")
    return LLAMA.format(**_facts(export), vocab_size=form.vocab_size, text_vocab_size=form.text_vocab_size,
                        symbols=symbols, ids=ids, tokenizer=opened)


def _facts(export: Export) -> dict:
    run = export.run
    parts = [*(["`tokenizer.json` says what its tokenizer is"] if run.tokenizer else []),
             *(["`codec.npz` turns pictures into its latents and back"] if run.codec else [])]
    return {"title": f"An export of {export.source.absolute().name}", "step": run.step, "dtype": export.dtype,
            "weights": {"ema": "averaged (EMA)", "raw": "raw"}[export.weights],
            "parts": "".join(f"; {part}" for part in parts)}
