"""The points of a sweep: what an experiment file lists, and what is frozen of it into points.jsonl.

    def get_sweep(arg=None):           # arg: the words after the colon, as for get_config
        return [dict(name="codec", config="experiments/quickstart.py:autoencoder", verbs=["train"]),
                dict(name="data", config="experiments/quickstart.py", verbs=["prepare"],
                     overrides={"data.prepared": "{data}/shards"}, flags={"prepare": {"codec": "{codec}"}}),
                dict(name="a", config="experiments/quickstart.py", overrides={"data.prepared": "{data}/shards",
                     "seed": 1}, tags={"seed": 1})]

A point is a config with single values changed, and the verbs that are run on it one after the other; without
`verbs` it is trained, then evaluated. `{name}` in a value stands for the workdir of the point of that name,
which is the sweep's folder and the name: who names another point waits for it. `flags` are further flags of a
verb, `tags` what a report sorts the points by, `topology` the slice that a cluster is asked for (`v5p-16`).
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

from tfusion import config, experiment, paths
from tfusion.accelerators import Accelerator, parse_accelerator
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.paths import replace_text
from tfusion.scaling import ladder
from tfusion.scaling.results import POINTS, flat

VERBS = ("prepare", "train", "evaluate")
GIVEN = {"name", "config", "overrides", "verbs", "flags", "tags", "topology"}
OURS = ("config", "workdir")  # flags that a sweep gives itself
LISTS = (list, tuple)
TYPES = {"config": str, "overrides": dict, "verbs": LISTS, "flags": dict, "tags": dict}
DERIVED = ("flops", "tokens", "params", "six_n_d")  # of the config: told last of what differs
TAKEN = (POINTS, "report", "compilation_cache")  # names in its folder that are none of a point's
NAME, NAMED = re.compile(r"(?!\d+$)[A-Za-z0-9_][\w.-]*"), re.compile(r"\{([\w.-]+)\}")
SHOWN = 3  # differences that are named
ON_A_SLICE = ("topology", "plan")  # absent in the files of sweeps without, and of versions before


class Point(NamedTuple):
    """A line of points.jsonl."""

    name: str
    config: str  # experiments/FILE.py:words
    overrides: dict  # {dotted key: value}, as the experiment has them
    verbs: list[str]
    flags: dict  # {verb: {flag: value}}
    tags: dict
    workdir: str  # the name, in the sweep's folder wherever that lies
    config_hash: str  # of `resolved`, the same wherever the sweep lies
    flops: float  # of the model, expected of the whole run: full rows, data.image_share of them in images
    tokens: int | None  # D, codes and patches among them; None without a transformer
    params: int | None  # N: ladder.shared_params
    six_n_d: float | None
    resolved: dict  # the whole config; other points' names stand in it as {name}
    topology: str | None = None  # the slice it is for; None: this machine
    plan: dict | None = None  # of a point that trains on a slice: verdicts.Verdict

    @property
    def needs(self) -> list[str]:
        """Points that it names, itself aside."""
        values = [*self.overrides.values(), *(v for flags in self.flags.values() for v in flags.values())]
        return sorted({name for value in values for name in NAMED.findall(str(value))} - {self.name})

    @property
    def folder(self) -> Path:
        return paths.path(self.workdir)

    @property
    def accelerator(self) -> Accelerator | None:
        return parse_accelerator(self.topology) if self.topology else None

    @property
    def line(self) -> str:
        """As it stands in points.jsonl: what is of a slice only where there is one."""
        return json.dumps({key: value for key, value in self._asdict().items()
                           if value is not None or key not in ON_A_SLICE})


def place(text, points: dict[str, Point]):
    """A value with `{name}` replaced by that point's workdir; what is no text as it is."""
    if not isinstance(text, str):
        return text
    return NAMED.sub(lambda match: points[match[1]].workdir, text)


def resolve(name: str, overrides: dict) -> config.RunConfig:
    """The config of experiments/FILE.py:words with values changed. Raises UserError that names the key."""
    tree = experiment.get(name)
    for key, value in overrides.items():
        *groups, last = key.split(".")
        if key == "objective" or last == "kind":
            raise UserError(f"{key}: a kind brings keys of its own, a variant of the experiment chooses it")
        if type(value) not in (bool, int, float, str):
            raise UserError(f"{key} = {value!r}: an override is a number, a text, True or False; a variant of "
                            "the experiment can have more")
        node, known = tree, []
        for group in [*groups, last]:
            known = list(node) if hasattr(node, "keys") else []
            if group not in known:
                near = difflib.get_close_matches(group, known, n=1)
                raise UserError(f"there is no {key} in {name}; "
                                + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"))
            above, node = node, node[group]
        try:
            above[last] = value
        except TypeError:
            raise UserError(f"{key} = {value!r} is {type(value).__name__}, where {name} has "
                            f"{type(node).__name__}") from None
    return config.from_dict(tree)


def make(given: list[dict], where: str, out: Path, topology: str | None = None) -> list[Point]:
    """Points of what get_sweep returned, checked. where: the experiment, for messages; topology: the slice of
    all, whatever the experiment says."""
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise UserError(f"{where}: get_sweep returns a list of points, each a dictionary, not {given!r:.60}")
    if not given:
        raise UserError(f"{where}: get_sweep returns no points")
    points: dict[str, Point] = {}
    for one in given:
        name = one.get("name")
        if "config" not in one:
            raise UserError(f"{where}: point '{name}' has no config: experiments/FILE.py[:words] is wanted")
        if wrong := [key for key, kind in TYPES.items() if key in one and not isinstance(one[key], kind)]:
            kind = TYPES[wrong[0]]
            raise UserError(f"{where}: point '{name}': {wrong[0]} = {one[wrong[0]]!r:.60} is no "
                            f"{'list' if kind is LISTS else kind.__name__}")
        if unknown := one.keys() - GIVEN:
            raise UserError(f"{where}: point '{name}' has '{min(unknown)}'; known: {', '.join(sorted(GIVEN))}")
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"{where}: a point's name is letters, digits, _ . and -, not {name!r}; nor is it a "
                            "number alone")
        if name in points:
            raise UserError(f"{where}: two points are named '{name}', and would share one workdir")
        if name in TAKEN:
            raise UserError(f"{where}: a point cannot be named '{name}', which is a sweep's own file")
        if same := next((other for other in points if other.casefold() == name.casefold()), None):
            raise UserError(f"{where}: points '{same}' and '{name}' would share one workdir where capital and "
                            "small letters are one; name one otherwise")
        try:
            points[name] = _point(out, **one | ({} if topology is None else {"topology": topology}))
        except UserError as e:
            raise UserError(f"{where}: point '{name}': {e}") from e
        if missing := [other for other in points[name].needs if other not in points]:
            raise UserError(f"{where}: point '{name}' names {{{missing[0]}}}, which is no point before it")
    _check_different(list(points.values()), where)
    return list(points.values())


def _point(out: Path, name: str, config: str, overrides=None, verbs=("train", "evaluate"), flags=None,
           tags=None, topology=None) -> Point:
    cfg, flags = resolve(config, overrides or {}), flags or {}
    if not verbs or (bad := [verb for verb in verbs if verb not in VERBS]):
        raise UserError(f"verbs = {list(verbs)}; choices: {', '.join(VERBS)}" if not verbs else
                        f"there is no verb '{bad[0]}' for points; choices: {', '.join(VERBS)}")
    _check_flags(flags, verbs)
    if "prepare" in verbs and (format := kind_of(cfg).row_format(cfg)) and format.data.image_share > 0 and (
            "codec" not in flags.get("prepare", {})):
        raise UserError("data.image_share says that there are pictures, which prepare encodes: flags = "
                        '{"prepare": {"codec": "{NAME}"}} is needed, of a point that trains an image tokenizer')
    values = [*(overrides or {}).values(), *(x for given in flags.values() for x in given.values())]
    if torn := [x for x in map(str, values) if set("{}") & set(NAMED.sub("", x))]:
        raise UserError(f"'{torn[0]}' has a brace of its own: {{name}} stands for another point's workdir")
    try:
        json.dumps([tags, flags])
    except (TypeError, ValueError) as e:
        raise UserError(f"its tags and flags are texts, numbers, True and False: {e}") from e
    if topology is not None:
        topology = parse_accelerator(str(topology)).name
    cost = ladder.cost(cfg) if "train" in verbs else ladder.Cost(0.0)
    resolved = cfg.to_dict()
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:16]
    return Point(name, config, overrides or {}, list(verbs), flags, tags or {}, str(out / name), digest,
                 *cost, resolved, topology)


def _check_flags(flags: dict, verbs: list[str]) -> None:
    """A wrong one would end its verb only when its turn comes, after hours of training."""
    for verb, given in flags.items():
        if verb not in verbs:
            raise UserError(f"it has flags of '{verb}', which is none of its verbs: {', '.join(verbs)}")
        if not isinstance(given, dict):
            raise UserError(f"its flags of '{verb}' are {given!r:.60}, not a dictionary")
        if own := [flag for flag in OURS if flag in given]:
            raise UserError(f"--{own[0]} is not for its flags of {verb}: a sweep gives it, each point its own")
        if bad := [flag for flag in given if flag not in flags_of(verb) and not flag.startswith("config.")]:
            near = difflib.get_close_matches(bad[0], flags_of(verb), n=1)
            raise UserError(f"{verb} has no flag --{bad[0]}; " + (
                f"did you mean --{near[0]}?" if near else f"known: --{', --'.join(sorted(flags_of(verb)))}"))


@functools.cache
def flags_of(verb: str) -> frozenset[str]:
    """Names of the flags that it defines: read, for of several verbs that one process imports each would define
    its --workdir."""
    source = Path(importlib.util.find_spec(f"tfusion.{verb}").origin).read_text()
    return frozenset(re.findall(r'(?:\bDEFINE_\w+|\bpaths\.define)\(\s*"(\w+)"', source))


def _check_different(points: list[Point], where: str) -> None:
    """Raises UserError where two points would do the same."""
    seen = {}
    for point in points:
        same = json.dumps([point.resolved, point.verbs, point.flags], sort_keys=True)
        if same in seen:
            raise UserError(f"{where}: points '{seen[same]}' and '{point.name}' are one and the same run; "
                            "another seed makes them two")
        seen[same] = point.name


def read(out: Path) -> list[Point]:
    """Raises UserError where there is no sweep, or its file is broken."""
    path = out / POINTS
    if not path.is_file():
        raise UserError(f"{path} not found: `python -m tfusion.sweep --config=experiments/FILE.py:words "
                        f"--out={out}` writes it")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [Point(**line | {"workdir": str(out / line["name"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is broken ({e}): move it away, and the command that wrote it writes it again"
                        ) from e


def freeze(out: Path, points: list[Point]) -> bool:
    """Writes points.jsonl; False where it is there and says the same. Points that were frozen without a slice
    take the one that they are given now; all else stays as it was frozen. Raises UserError where the file says
    something else."""
    if (out / POINTS).is_file():
        old, new = check_frozen(out, points), {point.name: point for point in points}
        if all(point.topology == new[point.name].topology for point in old):
            return False
        points = [point._replace(topology=new[point.name].topology, plan=new[point.name].plan)
                  if point.topology is None else point for point in old]
    paths.check_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / POINTS, "".join(f"{point.line}\n" for point in points))
    return True


def check_frozen(out: Path, points: list[Point]) -> list[Point]:
    """What is frozen in a folder, [] where nothing is. Raises UserError where it is another sweep."""
    if not (out / POINTS).is_file():
        return []
    old = read(out)
    if told := differences(old, points):
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise UserError(f"{out / POINTS} is another sweep: {'; '.join(told[:SHOWN])}{more}. Name another "
                        "--out, or put the experiment back as it was")
    return old


def differences(old: list[Point], new: list[Point]) -> list[str]:
    """What a frozen sweep has otherwise than the experiment does now, a few words each. A plan is no part of
    what a sweep is, and nor is a slice where none was frozen."""
    before, now = ({point.name: point for point in points} for points in (old, new))
    told = [f"'{name}' is frozen and no longer in the experiment" for name in before if name not in now]
    told += [f"'{name}' is new" for name in now if name not in before]
    for name in (name for name in before if name in now):
        a, b = (_flat(points[name]._replace(plan=None)) for points in (before, now))
        if before[name].topology is None:
            b["topology"] = None
        other = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)
                 and not key.startswith(("config_hash", "overrides.", "workdir"))]
        told += [f"'{name}': {key} was {a.get(key)}, is {b.get(key)}"
                 for key in sorted(other, key=lambda key: (key in DERIVED, key))]
    return told


def _flat(point: Point) -> dict:
    """As JSON has it; keys of the resolved config without 'resolved' in front."""
    tree = json.loads(json.dumps(point._asdict()))
    return {key.removeprefix("resolved."): value for key, value in flat(tree).items()}
