"""Configs: what is rejected and how it is said; every experiment is valid and declares the parameters that
tests/testdata/<experiment>_<variant>.txt says (`python -m tests.update_golden` writes those anew).
"""

import dataclasses
import functools
import importlib
import itertools
import json
import re
from pathlib import Path

import jax
import pytest
from absl.flags import FlagValues
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from experiments import common, quickstart
from tfusion import config, experiment, paths
from tfusion.errors import UserError
from tfusion.models.transformer import TransformerConfig
from tfusion.objectives import make_objective

ROOT = Path(__file__).parents[1]
TESTDATA = ROOT / "tests" / "testdata"


def tree(**changes):
    """The quickstart as nested dicts, with {'group__key': value} changed."""
    out = quickstart.get_config().to_dict()
    for name, value in changes.items():
        *groups, key = name.split("__")
        node = out
        for group in groups:
            node = node[group]
        node[key] = value
    return out


def message(**changes) -> str:
    with pytest.raises(UserError) as e:
        config.from_dict(tree(**changes))
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- keys and types

def test_unknown_key_suggests():
    assert message(model__num_layrs=3) == "unknown config key 'model.num_layrs'; did you mean 'num_layers'?"
    assert message(objektive="x") == "unknown config key 'objektive'; did you mean 'objective'?"
    assert message(model__zzz=1).startswith("unknown config key 'model.zzz'; known: num_layers, d_model,")


def test_missing_key():
    for name in ("seed", "model.num_layers", "sampling.sampler"):
        changed = tree()
        *group, key = name.split(".")
        del (changed[group[0]] if group else changed)[key]
        with pytest.raises(UserError, match=rf"config key '{re.escape(name)}' is missing; set it in the exp"):
            config.from_dict(changed)
    changed = tree()
    del changed["mesh"]
    with pytest.raises(UserError, match="config key 'mesh' is missing"):
        config.from_dict(changed)


@pytest.mark.parametrize(("name", "value", "kind"), [
    ("seed", "x", "int"), ("seed", 1.0, "int"), ("seed", True, "int"), ("seed", None, "int"),
    ("model.num_layers", "4", "int"), ("optimizer.learning_rate", "1e-3", "float"),
    ("optimizer.learning_rate", True, "float"), ("data.prepared", 3, "str"),
    ("data.sources.scenes.share", "much", "float"), ("data.sources.scenes.share", None, "float")])
def test_wrong_type(name, value, kind):
    assert message(**{name.replace(".", "__"): value}) == f"config key '{name}' must be {kind}, got {value!r}"


def test_wrong_kind_of_group():
    assert message(model=3) == "config key 'model' must be a group of keys, got 3"
    assert message(data__sources=3) == (
        "config key 'data.sources' must map names to groups of keys, got 3")


def test_whole_numbers_are_floats_too():
    cfg = config.from_dict(tree(loss_weight=5))
    assert type(cfg.loss_weight) is float


# ---------------------------------------------------------------- values

def leaf_rules(made) -> dict:
    """{dotted key: (value, its field's rule)} of every leaf of an experiment."""
    return {name: (value, rule) for name, value, rule, _ in config._leaves(config.from_dict(made))}


LEAVES = leaf_rules(quickstart.get_config()) | leaf_rules(quickstart.get_config("autoencoder"))
CHOICES = {name: rule["choices"] for name, (_, rule) in LEAVES.items() if "choices" in rule}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed(name):
    assert message(**{name.replace(".", "__"): "nonsense"}) == (
        f"{name} = 'nonsense'; choices: {', '.join(CHOICES[name])}")
    for choice in CHOICES[name]:
        config.from_dict(tree(**{name.replace(".", "__"): choice}))


def test_a_decay_fits_into_the_run():
    assert message(optimizer__decay_steps=100_000, train__num_steps=1000).endswith(
        "optimizer.decay_steps = 100000 are more than train.num_steps = 1000")


def test_samplers_are_the_process_own():
    assert message(sampling__sampler="euler") == "sampling.sampler = 'euler'; choices: ddim, ddpm"


def test_choices_are_found_by_class():
    assert config.choices(TransformerConfig, "remat") == ("none", "attention", "dots", "full")


def test_kinds_are_listed():
    assert message(objective="nonsense") == (
        f"objective = 'nonsense'; choices: {', '.join(config.REGISTRY['objective'])}")
    assert config.REGISTRY["objective"].keys() >= {"autoencoder", "transfusion"}
    for name, kinds in (("model.adapter", "linear"), ("process", "ddpm, flow")):
        group = functools.reduce(dict.__getitem__, name.split("."), tree())
        for wrong in ({**group, "kind": "x"}, {key: group[key] for key in group if key != "kind"}):
            assert message(**{name.replace(".", "__"): wrong}) == (
                f"{name}.kind = {wrong.get('kind')!r}; choices: {kinds}")
    assert message(data__sources__scenes__kind="x").startswith("data.sources.scenes.kind = 'x'; choices: ")
    assert message(data__sources__mine=3) == "config key 'data.sources.mine' must be a group of keys, got 3"


def test_a_component_is_registered_from_outside(monkeypatch):
    """One class, one registration, and a config may hold it."""
    monkeypatch.setitem(config.REGISTRY, "process", dict(config.REGISTRY["process"]))

    @config.register("process", "toy")
    @dataclasses.dataclass(frozen=True)
    class Toy:
        kind: str
        sharpness: float = config.fraction()

        def check_sampling(self, sampler: str, num_inference_steps: int) -> None:
            assert (sampler, num_inference_steps) == ("ddim", 25)

    toy = {"kind": "toy", "sharpness": 0.5}
    assert config.from_dict(tree(process=toy)).process == Toy(**toy)
    assert message(process={**toy, "sharpness": 2.0}) == "process.sharpness = 2.0 must be at most 1"
    assert message(process={**toy, "prediction": "v"}).startswith("unknown config key 'process.prediction'")


@pytest.mark.parametrize(("small", "value", "large", "of"), [
    ("model.num_heads", 3, "model.d_model", 128), ("model.num_kv_heads", 3, "model.num_heads", 4),
    ("model.adapter.patch_size", 3, "model.adapter.latent_size", 8),
    ("train.num_microbatches", 3, "train.batch_size", 4)])
def test_divisibility(small, value, large, of):
    assert message(**{small.replace(".", "__"): value}) == f"{small} = {value} must divide {large} = {of}"


def test_where_a_run_begins_is_said_once():
    assert message(train__branch_from="/a", train__init_from="/b") == (
        "train.branch_from and train.init_from are both given: a run begins once")


@pytest.mark.parametrize("every", [0, 700])
def test_the_best_checkpoint_is_one_that_was_evaluated(every):
    assert message(train__keep_best="eval/lm_loss", train__eval_every=every).startswith(
        "train.keep_best = 'eval/lm_loss' needs an evaluation at every checkpoint: train.eval_every = "
        f"{every} must divide")


def test_head_dim_is_even():
    assert message(model__d_model=12, model__num_heads=4) == (
        "model.d_model / model.num_heads = 3 must be even for RoPE")


NUMBERS = {name: value for name, (value, _) in leaf_rules(quickstart.get_config()).items()
           if type(value) in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_numbers_are_rejected(name):
    kind = type(NUMBERS[name])
    for value in (kind(-2), *([float("nan"), float("inf")] if kind is float else [])):
        said = message(**{name.replace(".", "__"): value})
        assert said in [f"{name} = {value} must be {what} and finite" for what in ("positive", "0 or more")]


ZERO = ("seed", "optimizer.warmup_steps", "train.eval_every", "train.diagnostics_every", "train.keep_every",
        "data.caption_dropout", "loss_weight", "sampling.guidance_scale", "data.sources.scenes.share")


@pytest.mark.parametrize("name", ZERO)
def test_zero_where_it_means_off(name):
    kind = type(NUMBERS[name])
    assert leaf_rules(tree(**{name.replace(".", "__"): kind(0)}))[name][0] == 0
    assert message(**{name.replace(".", "__"): kind(-2)}) == f"{name} = {kind(-2)} must be 0 or more and finite"


@pytest.mark.parametrize("name", ["model.num_layers", "train.num_steps", "train.batch_size", "train.log_every",
                                  "train.checkpoint_every", "train.keep_last", "data.seq_len", "mesh.data",
                                  "mesh.fsdp"])
def test_zero_where_it_means_nothing(name):
    assert message(**{name.replace(".", "__"): 0}) == f"{name} = 0 must be positive and finite"


@pytest.mark.parametrize("name", ["data.caption_dropout", "data.image_first_fraction",
                                  "data.image_first_max_t", "optimizer.ema_decay"])
def test_fractions(name):
    assert message(**{name.replace(".", "__"): 1.01}) == f"{name} = 1.01 must be at most 1"
    config.from_dict(tree(**{name.replace(".", "__"): 1.0}))


def test_b2_is_below_one():
    for value in (1.0, 2.0, 1 - 1e-9):  # the last is 1 in float32
        assert message(optimizer__b2=value) == f"optimizer.b2 = {value} must be below 1"


@pytest.mark.parametrize("name", NUMBERS)
def test_integers_that_the_devices_cannot_hold(name):
    """2^32 would wrap around to 0 without a word, as a seed does in jax.random.key."""
    kind = type(NUMBERS[name])
    most = config.UINT32 if name == "seed" else config.INT32
    changed = {name.replace(".", "__"): 10**40 if kind is float else most + 1}
    said = "be between 1.2e-38 and 3.4e+38, as float32 is" if kind is float else f"be at most {most}"
    assert message(**changed) == f"{name} = {kind(*changed.values())} must {said}"


def test_floats_too_small_for_float32():
    assert message(optimizer__learning_rate=1e-50) == (
        "optimizer.learning_rate = 1e-50 must be between 1.2e-38 and 3.4e+38, as float32 is")


def test_seeds_up_to_the_last_are_all_different():
    seeds = [0, 1, config.INT32, config.INT32 + 1, config.UINT32]
    for seed in seeds:
        config.from_dict(tree(seed=seed))
    assert len({tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}) == len(seeds)


def test_rows_are_numbered_in_int32():
    most = config.INT32 // 4
    config.from_dict(tree(train__batch_size=4, train__num_steps=most))
    assert message(train__batch_size=4, train__num_steps=most + 1) == (
        f"train.num_steps = {most + 1} x train.batch_size = 4 must be at most 2147483647 rows")


def test_more_sampling_steps_than_timesteps():
    assert message(sampling__num_inference_steps=1001) == (
        "sampling.num_inference_steps = 1001 must be at most process.num_timesteps = 1000")


@pytest.mark.parametrize("name", ["a.b", "../x", "meta.json", "x/y", ""])
def test_names_of_sources(name):
    """They name folders, and keys on the command line."""
    changed = tree()
    changed["data"]["sources"][name] = changed["data"]["sources"]["scenes"]
    with pytest.raises(UserError, match="must be a name of letters"):
        config.from_dict(changed)


@pytest.mark.parametrize("changes", [{"data__sources": {}}, {
    f"data__sources__{name}__share": 0.0 for name in ("scenes", "stories", "glosses")}])
def test_sources_without_a_share(changes):
    assert message(**changes) == "data.sources must give at least one source a positive share"


def test_fsdp_may_be_the_devices_left_over():
    assert config.from_dict(tree(mesh__fsdp=-1)).mesh.fsdp == -1


# ---------------------------------------------------------------- saved and loaded

def test_round_trip_through_json(tmp_path):
    cfg = config.from_dict(quickstart.get_config())
    assert config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    config.save(cfg, tmp_path)
    assert config.load(tmp_path) == cfg
    assert hash(config.load(tmp_path)) == hash(cfg)  # jitted functions take it as a static argument


def test_load_from_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"config\.json not found: .* is not the workdir of"):
        config.load(tmp_path)


# ---------------------------------------------------------------- experiments

def get(experiment: str, arg: str | None = None):
    return importlib.import_module(f"experiments.{experiment}").get_config(arg)


def groups(experiment: str) -> list[list[str]]:
    """The words that `parse` offers, by group; [] where the experiment takes none."""
    try:
        get(experiment, "?")
    except ValueError as e:
        choices = re.fullmatch(r"unknown variant '\?'; at most one of each: (.+)", str(e))[1]
        return [group.split(": ")[1].split(", ") for group in choices.split("; ")]
    return []


EXPERIMENTS = [(path.stem, variant) for path in sorted((ROOT / "experiments").glob("*.py"))
               if path.stem not in ("__init__", "common")
               for variant in ([*itertools.chain(*groups(path.stem))] or [None])]
NAMES = sorted({name for name, _ in EXPERIMENTS})


def test_replace_text_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    paths.replace_text(path, "old")
    paths.replace_text(path, "new")
    assert path.read_text() == "new"
    monkeypatch.setattr(paths.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        paths.replace_text(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_experiment_without_variants(tmp_path):
    path = tmp_path / "ten_lines.py"
    path.write_text("def get_config():\n    return {}\n")
    assert experiment._variants(str(path)) == f"{path} has no variants"


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends while the first is writing: one of theirs stands, neither fails."""
    path, sync = tmp_path / "x.json", paths.os.fsync

    def meanwhile(fd):
        monkeypatch.setattr(paths.os, "fsync", sync)
        paths.replace_text(path, "second")

    monkeypatch.setattr(paths.os, "fsync", meanwhile)
    paths.replace_text(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def describe(experiment: str, variant: str | None) -> str:
    """Name, shape, dtype and logical axes of every parameter; allocates nothing."""
    cfg = config.from_dict(get(experiment, variant))
    params = jax.eval_shape(make_objective(cfg).init, jax.random.key(0))
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        value = nn.meta.unbox(leaf)
        lines.append(f"{'/'.join(key.key for key in path)} {'x'.join(map(str, value.shape))} {value.dtype} "
                     f"{','.join(map(str, axes)) or '-'}\n")
    return "".join(lines)


def golden_path(experiment: str, variant: str | None) -> Path:
    return TESTDATA / f"{'_'.join(filter(None, (experiment, variant)))}.txt"


@pytest.mark.parametrize(("experiment", "variant"), EXPERIMENTS)
def test_experiment_declares_its_parameters(experiment, variant):
    path = golden_path(experiment, variant)
    assert path.exists(), f"new experiment: run `python -m tests.update_golden` and commit {path}"
    assert describe(experiment, variant) == path.read_text()


def test_no_golden_file_without_an_experiment():
    assert {path.name for path in TESTDATA.glob("*.txt")} == {golden_path(*x).name for x in EXPERIMENTS}


@pytest.mark.parametrize("experiment", NAMES)
def test_variants_compose(experiment):
    """One word of each group, in any order, is a valid config; each word of a group says something else."""
    choices = groups(experiment)
    for words in choices:
        assert len({get(experiment, word).to_json() for word in words}) == len(words)
    for words in itertools.product(*([*words, None] for words in choices)):
        given = [word for word in words if word]
        cfg = config.from_dict(get(experiment, ",".join(given)))
        assert cfg == config.from_dict(get(experiment, ",".join(reversed(given))))


@pytest.mark.parametrize(("arg", "message"), [
    ("huge", "unknown variant 'huge'; at most one of each: size: 0.16b, 0.37b, 0.76b, 1.4b, 7b"),
    ("0.76b,,", "unknown variant ''; at most one of each: size: "),
    ("7b,0.16b", "variants '7b' and '0.16b': at most one size can be chosen"),
    ("7b,7b", "variants '7b' and '7b': at most one size can be chosen")])
def test_variants_that_cannot_be(arg, message):
    with pytest.raises(ValueError) as e:
        get("transfusion", arg)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


@pytest.mark.parametrize("experiment", ["transfusion", "ablations"])
def test_strict_leaves_two_things_out_and_changes_no_more(experiment):
    added, strict = get(experiment), get(experiment, "strict")
    assert (added.optimizer.ema_decay, added.data.caption_dropout) == (0.9999, 0.1)
    assert (strict.optimizer.ema_decay, strict.data.caption_dropout) == (0.0, 0.0)
    added.optimizer.ema_decay = added.data.caption_dropout = 0.0
    assert added.to_dict() == strict.to_dict()


def test_words_that_came_after_the_paper():
    flow, wsd = get("transfusion", "flow"), get("transfusion", "0.16b,wsd")
    assert dict(flow.process) == dict(kind="flow", times="logit_normal", shift=1.0)
    assert flow.sampling.sampler == "euler" and wsd.optimizer.decay_steps == 25_000
    common.use_rectified_flow(flow, patches=1024)
    assert flow.process.shift == 2.0


ABLATED = {  # what each changes; image slots follow from the patch size
    "text_only": {"data.image_share": 0.0, "train.batch_size": 256},  # and its only source is text
    "causal_images": {"model.image_attention": "causal"}, "linear_noise_limit": {"data.image_first_max_t": 0.5},
    "patch1": {"model.adapter.patch_size": 1}, "patch2": {}, "patch4": {"model.adapter.patch_size": 4},
    "patch8": {"model.adapter.patch_size": 8}}


@pytest.mark.parametrize("ablation", ABLATED)
def test_an_ablation_changes_what_it_is_named_after(ablation):
    base, ablated = (flatten_dict(get("ablations", x).to_dict(), sep=".") for x in (None, ablation))
    assert base == flatten_dict(get("transfusion", "0.76b").to_dict(), sep=".")
    changed = {key: ablated[key] for key in base if ablated.get(key, base[key]) != base[key]}
    gone = {key.split(".")[2] for key in base.keys() - ablated.keys()}
    assert changed == ABLATED[ablation] and ablated.keys() <= base.keys()
    assert gone == ({"images"} if ablation == "text_only" else set())


def test_table_4_goes_in_steps():
    """Llama's recipe; with diffusion; or with Chameleon's changes, and then with the loss on image tokens."""
    assert {*groups("ablations")[0]} == {*ABLATED, "stable_text_only", "image_codes"}
    llama, stable, codes = (flatten_dict(get("ablations", x).to_dict(), sep=".")
                            for x in ("text_only", "stable_text_only", "image_codes"))
    assert codes == flatten_dict(get("chameleon", "0.76b").to_dict(), sep=".")
    changed = {key: stable[key] for key in llama.keys() & stable.keys() if llama[key] != stable[key]}
    assert changed == {
        "objective": "chameleon", "optimizer.learning_rate": 1e-4, "model.qk_norm": "layernorm",
        "model.norm_order": "post", "data.prepared": "data/prepared_codes"}
    assert stable["z_loss_weight"] == 1e-5 and not any("images" in key for key in stable if "sources" in key)
    added = {key for key in codes if stable.get(key) != codes[key]}
    assert {key for key in added if "sources" not in key} == {"data.image_share", "train.batch_size"}


@pytest.mark.parametrize(("experiment", "variant", "share", "slots"), [
    ("ablations", "patch1", None, 3), ("ablations", "patch2", None, 10), ("ablations", "patch4", None, 39),
    ("ablations", "patch8", None, 143), ("ablations", "text_only", None, 0), ("quickstart", None, None, 5),
    ("ablations", "patch1", 1.0, 3), ("ablations", "patch2", 1.0, 15), ("ablations", "patch2", 0.01, 1)])
def test_image_slots_follow_from_share_and_patches(experiment, variant, share, slots):
    """1.25 x share x T / (N + 2), rounded up; never more than fit, never none where there are images."""
    made = get(experiment, variant)
    made.data.image_share = made.data.image_share if share is None else share
    assert config.from_dict(made).rows.image_slots == slots


def test_tokens_in_a_step_of_the_ablations():
    """Table 4: 1M text tokens a step, with 1M patches beside them or alone."""
    both, alone = (config.from_dict(get("ablations", x)) for x in (None, "text_only"))
    assert both.train.batch_size * both.data.seq_len * both.data.sources["text"].share == 2**20
    assert alone.train.batch_size * alone.data.seq_len == 2**20


@pytest.mark.parametrize("experiment", NAMES)
def test_the_docstring_is_the_command(experiment):
    doc = importlib.import_module(f"experiments.{experiment}").__doc__
    assert f"python -m tfusion.train --config=experiments/{experiment}.py" in re.sub(r"\s+", " ", doc)


def documented_commands() -> list[str]:
    """Flags of every `python -m tfusion.<verb> --config=...` in docstrings, README and docs."""
    texts = [p.read_text() for folder, pattern in ((".", "*.md"), ("docs", "*.md"), ("experiments", "*.py"),
                                                   ("tfusion", "*.py")) for p in (ROOT / folder).glob(pattern)]
    found = re.findall(r"python -m\s+tfusion\.\w+ +([^\n`]*)", re.sub(r"\\\n\s*", "", "\n".join(texts)))
    return sorted({line for line in found if re.search(r"--config=experiments/(?!mine)", line)})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_valid(command, monkeypatch):
    """The config that the command names, changed as it says."""
    flags = FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flags)
    given = [word for word in command.split() if word.startswith("--config")]
    argv = ["verb", *(word.replace("=experiments", f"={ROOT}/experiments") for word in given)]
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for the overrides
    flags(argv)
    config.from_dict(flags.config)
