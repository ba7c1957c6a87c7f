"""The configuration of a run: frozen dataclasses, built once from the experiment's ConfigDict.

This file knows no component. Each declares a dataclass beside its code and says by each field what may stand
there (`choice`, `number`, `scheduled`, `fraction`, `path`; a plain int or float is positive and finite). Where
one of several may stand, the group's classes are registered by kind:

    @register("process", "ddpm")                       class TransfusionConfig(RunConfig):
    @dataclasses.dataclass(frozen=True)                    process: Any = component("process")
    class DDPM:                                            ...
        kind: str
        prediction: str = choice("eps", "v", "x0")     process=dict(kind="ddpm", prediction="eps", ...)

The class of a whole config is its kind of training's own, registered under "objective" (objectives/). Every
knob has its value in the experiment file: nothing here supplies a default. Derived numbers are properties.
`from_dict` raises UserError with one line naming the key and the choices.
"""

import dataclasses
import difflib
import functools
import json
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

from tfusion import paths
from tfusion.errors import UserError

INT32, UINT32, FLOAT32 = 2**31 - 1, 2**32 - 1, (2.0**-126, 2.0**128)  # what the devices count and compute in
REGISTRY: dict[str, dict[str, type]] = {}  # group -> kind -> dataclass


def register(group: str, kind: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, with a field `kind`, that may stand in fields of the group."""

    def add(cls: type) -> type:
        REGISTRY.setdefault(group, {})[kind] = cls
        return cls

    return add


# ---------------------------------------------------------------- what a field may hold

def group(may_change: bool = False):
    """A field of a dataclass's type. may_change, here and below: it may differ where a run is resumed."""
    return dataclasses.field(metadata={"may_change": may_change})


def component(name: str):
    """A field that holds one of a registered group's dataclasses."""
    return dataclasses.field(metadata={"component": name})


def components(name: str, fixed: tuple[str, ...]):
    """A field that holds {name: one of the group's dataclasses}; at resume the keys in `fixed` must be as they
    were, and no more of them."""
    return dataclasses.field(hash=False, metadata={"components": name, "fixed": fixed})


def choice(*names: str, may_change: bool = False):
    return dataclasses.field(metadata={"choices": names, "may_change": may_change})


def number(zero: bool = False, most: float = INT32, may_change: bool = False, also: int | None = None):
    """Positive and finite, or 0 where that means off, or `also`; at most `most`, in whole numbers."""
    return dataclasses.field(metadata={"zero": zero, "most": most, "may_change": may_change, "also": also})


def scheduled():
    """A number, positive or 0; or ((row, number), ...): what it is at some rows of the run, in between on a
    straight line, and after the last as there. The first row is 0."""
    return dataclasses.field(metadata={"scheduled": True, "zero": True})


def fraction(zero: bool = True, may_change: bool = False):
    """At most 1."""
    return dataclasses.field(metadata={"zero": zero, "fraction": True, "may_change": may_change})


def path(*names: str, buckets: bool = False):
    """A file or folder, in a bucket too where it says so, or one of `names`, which are not paths; where it lies
    may change."""
    return dataclasses.field(metadata={"path": paths.anywhere if buckets else paths.local, "names": names,
                                       "may_change": True})


def choices(cls: type, key: str) -> tuple[str, ...]:
    """What may stand in a dataclass's field."""
    return next(field.metadata["choices"] for field in dataclasses.fields(cls) if field.name == key)


# ---------------------------------------------------------------- what every run has

@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    warmup_steps: int = number(zero=True)
    decay_steps: int = number(zero=True)  # the last so many, linear, after a plateau; 0: one cosine
    b2: float
    weight_decay: float = number(zero=True)
    ema_decay: float = fraction()

    def check(self, name: str) -> None:
        if self.b2 >= 1 - 2**-25:  # 1 in float32, and a division by 1 - b2^n
            raise UserError(f"{name}.b2 = {self.b2} must be below 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    batch_size: int  # rows in the global batch
    num_microbatches: int
    log_every: int
    eval_every: int = number(zero=True)
    eval_documents: int  # held-out records of each source that are looked at
    diagnostics_every: int = number(zero=True)
    checkpoint_every: int
    checkpoint_minutes: float = number(zero=True)  # a save at the log step after as long; 0: never so
    nonfinite: str = choice("stop", "skip")  # a step whose losses or gradient are not: an error, or left out
    watchdog_minutes: float = number(zero=True)  # the process ends where none ends for as long; 0: never
    keep_last: int  # checkpoints
    keep_every: int = number(zero=True)  # and those of steps that this divides
    keep_best: str  # "none", or a figure of the evaluation: and the one where it is least
    branch_from: str = path("none", buckets=True)  # a run or its checkpoints/<step>: a new one goes on there
    init_from: str = path("none", buckets=True)  # the same: a new run begins with its parameters

    def check(self, name: str) -> None:
        if self.keep_best != "none" and (not self.eval_every or self.checkpoint_every % self.eval_every):
            raise UserError(f"{name}.keep_best = {self.keep_best!r} needs an evaluation at every checkpoint: "
                            f"{name}.eval_every = {self.eval_every} must divide {name}.checkpoint_every = "
                            f"{self.checkpoint_every}")
        if "none" not in (self.branch_from, self.init_from):
            raise UserError(f"{name}.branch_from and {name}.init_from are both given: a run begins once")
        if self.num_steps * self.batch_size > INT32:  # rows are numbered in int32
            raise UserError(f"{name}.num_steps = {self.num_steps} x {name}.batch_size = {self.batch_size} "
                            f"must be at most {INT32} rows")
        check_divides(name, self, "num_microbatches", "batch_size")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes; one may be -1: the devices left over."""

    data: int = number(also=-1)
    fsdp: int = number(also=-1)
    tensor: int = number(also=-1)
    sequence: int = number(also=-1)  # context parallelism: positions of a row over devices

    def check(self, name: str) -> None:
        filling = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) == -1]
        if len(filling) > 1:
            raise UserError(f"{name}: {' and '.join(filling)} are -1; one axis may take the devices left over")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every kind of training has; each kind adds its own groups."""

    objective: str  # the kind of training
    seed: int = number(zero=True, most=UINT32)
    optimizer: OptimizerConfig = group(may_change=True)
    train: TrainConfig = group(may_change=True)
    mesh: MeshConfig = group(may_change=True)

    def to_dict(self) -> dict:
        """JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


# ---------------------------------------------------------------- building and checking

def from_dict(tree) -> RunConfig:
    """Builds and validates a config from nested mappings (a ConfigDict or parsed JSON)."""
    kinds = REGISTRY.get("objective", {})
    name = tree["objective"] if hasattr(tree, "keys") and "objective" in tree else None
    if name not in kinds:
        raise UserError(f"objective = {name!r}; choices: {', '.join(kinds)}")
    cfg = _build(kinds[name], tree, "")
    warmup, decay, steps = cfg.optimizer.warmup_steps, cfg.optimizer.decay_steps, cfg.train.num_steps
    if decay and warmup + decay > steps:
        raise UserError(f"optimizer.warmup_steps = {warmup} and optimizer.decay_steps = {decay} are more than "
                        f"train.num_steps = {steps}")
    return cfg


def load(workdir) -> RunConfig:
    """Reads the resolved configuration that `train` left in a workdir."""
    path = paths.path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{path} not found: {workdir} is not the workdir of a training run")
    try:
        tree = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is broken ({e}): resume the run with its --config to write it again") from e
    return from_dict(tree)


def changed(cfg: RunConfig, values: dict) -> RunConfig:
    """cfg with {"group.key": value} put in, None where it stays: for flags of verbs that stand for config keys.

    Raises UserError where there is no such key, or the whole is not a valid config.
    """
    tree = cfg.to_dict()
    for name, value in values.items():
        if value is not None:
            *groups, key = name.split(".")
            node = functools.reduce(lambda node, group: node.get(group, {}), groups, tree)
            if key not in node:
                raise UserError(f"a run with objective = '{cfg.objective}' has no {name}")
            node[key] = value
    return from_dict(tree)


def _leaves(cfg, prefix: str = "", free: bool = False) -> Iterator[tuple[str, Any, Any, bool]]:
    """(dotted key, value, its field's rule, whether it may change at resume) of every leaf."""
    for field in dataclasses.fields(cfg):
        name, value, rule = prefix + field.name, getattr(cfg, field.name), field.metadata
        if "components" in rule:
            for key, one in value.items():
                yield from ((n, v, r, n.rsplit(".", 1)[1] not in rule["fixed"])
                            for n, v, r, _ in _leaves(one, f"{name}.{key}."))
        elif dataclasses.is_dataclass(value):
            yield from _leaves(value, name + ".", free or rule.get("may_change", False))
        else:
            yield name, value, rule, free or rule.get("may_change", False)


def may_change(cfg: RunConfig) -> set[str]:
    """Dotted keys that may differ where a run is resumed."""
    return {name for name, _, _, free in _leaves(cfg) if free}


def absolute(cfg: RunConfig) -> RunConfig:
    """cfg with its paths made absolute: what a run keeps is read from other folders too."""
    return changed(cfg, {name: paths.absolute(value) for name, value, rule, _ in _leaves(cfg)
                         if rule.get("path") and value not in rule["names"]})


def save(cfg: RunConfig, workdir) -> None:
    paths.replace_text(paths.path(workdir) / "config.json", json.dumps(cfg.to_dict(), indent=2) + "\n")


def _group(tree, prefix: str) -> None:
    if not hasattr(tree, "keys"):
        raise UserError(f"config key '{prefix[:-1]}' must be a group of keys, got {tree!r}")


def _build(cls: type, tree, prefix: str):
    _group(tree, prefix)
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"unknown config key '{prefix}{key}'; {hint}")
    missing = [key for key in fields if key not in tree]
    if missing:
        raise UserError(f"config key '{prefix}{missing[0]}' is missing; set it in the experiment file")
    built = cls(**{key: _value(hints[key], field.metadata, tree[key], prefix + key)
                   for key, field in fields.items()})
    if hasattr(built, "check"):
        built.check(prefix.rstrip("."))
    return built


def _value(hint, rule, value, name: str):
    if "component" in rule:
        return _component(rule["component"], value, name)
    if "components" in rule:
        if not hasattr(value, "keys"):
            raise UserError(f"config key '{name}' must map names to groups of keys, got {value!r}")
        return {key: _component(rule["components"], value[key], f"{name}.{key}") for key in value}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name + ".")
    if "scheduled" in rule and isinstance(value, list | tuple):
        return _schedule(value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is not Any and type(value) is not hint:
        raise UserError(f"config key '{name}' must be {hint.__name__}, got {value!r}")
    return _leaf(rule, value, name)


def _component(group: str, tree, name: str):
    _group(tree, name + ".")
    kinds = REGISTRY[group]
    if "kind" not in tree or tree["kind"] not in kinds:
        raise UserError(f"{name}.kind = {tree.get('kind')!r}; choices: {', '.join(kinds)}")
    return _build(kinds[tree["kind"]], tree, name + ".")


def _leaf(rule, value, name: str):
    """The value, held to what its field may hold."""
    if "choices" in rule and value not in rule["choices"]:
        raise UserError(f"{name} = {value!r}; choices: {', '.join(rule['choices'])}")
    if isinstance(value, int | float) and value != rule.get("also"):
        check_number(name, value, rule.get("zero", False), rule.get("most", INT32))
        if rule.get("fraction") and value > 1:
            raise UserError(f"{name} = {value} must be at most 1")
    if rule.get("path"):
        try:
            return rule["path"](value)
        except UserError as e:
            raise UserError(f"{name} = {value!r}: {e}") from e
    return value


def _schedule(value, name: str) -> tuple[tuple[int, float], ...]:
    pairs = [pair for pair in value if isinstance(pair, list | tuple) and len(pair) == 2]
    rows = [row for row, _ in pairs]
    whole = all(type(row) is int and row <= INT32 for row in rows)
    if not pairs or len(pairs) < len(value) or not whole or rows[0] != 0 or sorted({*rows}) != rows:
        raise UserError(f"{name} = {value!r}: a number is wanted, or ((0, number), (row, number), ...), whole "
                        f"rows in ascending order from 0 to {INT32}")
    return tuple((row, _value(float, {"zero": True}, number, f"{name} at row {row}")) for row, number in pairs)


def check_divides(name: str, cfg, small: str, large: str) -> None:
    a, b = getattr(cfg, small), getattr(cfg, large)
    if b % a:
        raise UserError(f"{name}.{small} = {a} must divide {name}.{large} = {b}")


def check_number(name: str, value: float, may_be_zero: bool = False, most: int = INT32) -> None:
    """Raises UserError where a number is not positive (or 0, where that means off), not finite, or one that
    the devices do not hold: JAX takes seed 2^32 for seed 0.
    """
    if not (0 < value < math.inf or (value == 0 and may_be_zero)):  # NaN is neither
        what = "0 or more" if may_be_zero else "positive"
        raise UserError(f"{name} = {value} must be {what} and finite")
    if isinstance(value, int) and value > most:
        raise UserError(f"{name} = {value} must be at most {most}")
    if isinstance(value, float) and value and not FLOAT32[0] <= value < FLOAT32[1]:
        raise UserError(f"{name} = {value} must be between 1.2e-38 and 3.4e+38, as float32 is")
