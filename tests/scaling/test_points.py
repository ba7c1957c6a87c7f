"""What a sweep is frozen into, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.scaling.conftest import EXPERIMENT, SWEEP
from tfusion import config, experiment
from tfusion.errors import UserError
from tfusion.scaling import ladder, points

ROOT = Path(__file__).parents[2]


def test_a_frozen_point_holds_all_that_its_run_will_be(sweep):
    frozen = sweep.freeze()
    lines = [json.loads(line) for line in (sweep.out / "points.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["data", "a", "b"]
    a, b = lines[1:]
    assert a["config"] == str(sweep.path) and a["overrides"] == {"data.prepared": "{data}/made", "seed": 1}
    assert a["workdir"] == str(sweep.out / "a") and a["tags"] == {"part": "ladder"}
    assert a["verbs"] == ["train", "evaluate"] and b["flags"] == {"evaluate": {"number": 8}}
    assert a["resolved"]["seed"] == 1 and b["resolved"]["model"]["d_model"] == 256
    cfg = config.from_dict(a["resolved"])
    assert a["tokens"] == cfg.train.num_steps * cfg.train.batch_size * cfg.data.seq_len
    assert a["six_n_d"] == 6 * a["params"] * a["tokens"] and a["flops"] > 0 and lines[0]["flops"] == 0
    assert frozen["a"].needs == ["data"] and frozen["data"].needs == []
    assert points.read(sweep.out) == list(frozen.values())


def test_the_hash_is_of_the_config_and_not_of_where_the_sweep_lies(sweep, tmp_path):
    first = sweep.make()[1]
    sweep.out = tmp_path / "elsewhere"
    second = sweep.make()[1]
    assert first.config_hash == second.config_hash and first.workdir != second.workdir
    sweep.write(SWEEP.replace('"seed": 1', '"seed": 2'))
    assert sweep.make()[1].config_hash != first.config_hash


def test_other_points_are_named_by_their_workdirs(sweep):
    named = sweep.freeze()
    assert points.place("{data}/made", named) == f"{sweep.out}/data/made"
    assert points.place(3, named) == 3


def test_n_is_the_shared_transformer_with_the_texts_embeddings():
    """By hand, of the smallest pack size: the same for both recipes, whatever adapters and codes add."""
    made = [ladder.cost(config.from_dict(experiment.get(f"experiments/scaling.py:pack,{recipe},s1")))
            for recipe in ("transfusion", "chameleon")]
    block = 4 * 64 * 64 + 3 * 64 * 176
    assert {cost.params for cost in made} == {2 * (block + 2 * 64) + 64 + 2 * 1022 * 64}
    assert len({cost.tokens for cost in made}) == len({cost.six_n_d for cost in made}) == 1
    assert len({cost.flops for cost in made}) == 2  # what the mathematics takes differs


@pytest.mark.parametrize(("sweep_text", "message"), [
    ("[]", "tiny: get_sweep returns no points"),
    ('dict(name="a")', "tiny: get_sweep returns a list of points, each a dictionary, not {'name'"),
    ('[dict(name="a", config=None)]', "point 'a': config = None is no str"),
    ('[dict(name="a", config="FILE", overrides=["seed"])]', r"overrides = \['seed'\] is no dict"),
    ('[dict(name="a", config="FILE", flags={"train": ["x"]})]', "its flags of 'train' are .* not a dictionary"),
    ('[dict(name="a", config="FILE", overrides={"train.num_steps": "many"})]',
     "train.num_steps = 'many' is str, where .* has int"),
    ('[dict(name="a", config="FILE", overrides={"data.prepared": "{data"})]', "'{data' has a brace of its own"),
    ('[dict(name="compilation_cache", config="FILE")]', "which is a sweep's own file"),
    ('[dict(name="a", config="FILE")] * 2', "two points are named 'a', and would share one workdir"),
    ('[dict(name=x, config="FILE") for x in "ab"]', "points 'a' and 'b' are one and the same run"),
    ('[dict(name=x, config="FILE", overrides={"seed": i}) for i, x in enumerate(["lr", "LR"])]',
     "points 'lr' and 'LR' would share one workdir where capital and small letters are one"),
    ('[dict(name="report", config="FILE")]', "cannot be named 'report', which is a sweep's own file"),
    ('[dict(name="a", config="FILE", flags={"train": {"workdir": "runs/x"}})]',
     "point 'a': --workdir is not for its flags of train: a sweep gives it"),
    ('[dict(name="a", config="FILE", flags={"evaluate": {"numbr": 8}})]',
     "point 'a': evaluate has no flag --numbr; did you mean --number?"),
    ('[dict(name="a", config="FILE", flags={"train": {"x": 8}})]',
     "train has no flag --x; known: --dry_run, --profile, --resume, --wandb, --workdir"),
    ('[dict(name="a", config="FILE", verbs=["prepare"])]',
     'point \'a\': data.image_share says .* {"prepare": {"codec": "{NAME}"}} is needed'),
    ("[dict(name='a')]", "point 'a' has no config: experiments/FILE.py.:words. is wanted"),
    *[(f'[dict(name="a", config="FILE", verbs={verbs!r})]', f"point 'a': verbs = {verbs!r} is no list")
      for verbs in (5, "train")],
    ('[dict(name="a", config="FILE", tags={"x": {1}})]', "point 'a': its tags and flags are texts, .* set "),
    ('[dict(name="a", config="FILE", flags={"trian": {"resume": "latest_good"}})]',
     "flags of 'trian', which is none of its verbs: train, evaluate"),
    ('[dict(name="a", config="FILE", topology="v5p-100")]',
     "point 'a': 'v5p-100' is not a valid slice of v5p .*: v5p-64 .*, v5p-128 .*, v5p-256 "),
    ('[dict(name="a", config="FILE", topology="v9-8")]', "point 'a': unknown topology 'v9-8'; "),
    ('[dict(name="a", config="FILE", topology=16)]', "point 'a': unknown topology '16'; "),
    ('[dict(name="a/b", config="FILE")]', "letters, digits, _ . and -, not 'a/b'"),
    ('[dict(name="7", config="FILE")]', "not '7'; nor is it a number alone"),
    ('[dict(name="a", config="FILE", verb=["train"])]', "point 'a' has 'verb'; known: config, flags, name"),
    ('[dict(name="a", config="FILE", verbs=["fly"])]', "no verb 'fly' for points; choices: prepare, train"),
    ('[dict(name="a", config="FILE", verbs=[])]', "verbs = []; choices: prepare, train, evaluate"),
    ('[dict(name="a", config="FILE", overrides={"train.num_step": 3})]',
     "there is no train.num_step in .*; did you mean 'num_steps'?"),
    ('[dict(name="a", config="FILE", overrides={"optimiser.b2": 3})]', "did you mean 'optimizer'?"),
    ('[dict(name="a", config="FILE", overrides={"seed.x": 3})]', "there is no seed.x"),
    ('[dict(name="a", config="FILE", overrides={"process.kind": "flow"})]', "process.kind: a kind brings keys"),
    ('[dict(name="a", config="FILE", overrides={"train.num_steps": -3})]', "num_steps = -3 must be positive"),
    ('[dict(name="a", config="FILE", overrides={"data.sources": {}})]', "an override is a number, a text"),
    ('[dict(name="a", config="FILE", overrides={"data.prepared": "{b}/x"}), dict(name="b", config="FILE")]',
     "point 'a' names {b}, which is no point before it"),
    ('[dict(name="a", config="FILE:huge")]', "unknown variant 'huge'"),
    ('[dict(name="a", config="nowhere.py")]', "nowhere.py not found")])
def test_what_is_refused(sweep, sweep_text, message):
    sweep.write(sweep_text)
    with pytest.raises(UserError, match=message.replace("[]", r"\[\]").replace("?", r"\?")) as e:
        sweep.make()
    assert "\n" not in str(e.value)


def test_the_same_sweep_again_changes_nothing_and_another_is_refused(sweep):
    sweep.freeze()
    before = (sweep.out / "points.jsonl").read_text()
    assert points.freeze(sweep.out, sweep.make()) is False
    sweep.write(SWEEP.replace('"seed": 1', '"seed": 2').replace('name="b"', 'name="c"'))
    with pytest.raises(UserError, match=r"is another sweep: 'b' is frozen and no longer in the experiment; "
                                        r"'c' is new; 'a': seed was 1, is 2\. Name another --out"):
        points.freeze(sweep.out, sweep.make())
    assert (sweep.out / "points.jsonl").read_text() == before


PLAN = {"chips": 8, "fits": True}


def on_slices(sweep, topology: str | None = None) -> list:
    """Points with a slice, and a plan of those that train."""
    made = points.make(experiment.call(str(sweep.path), "get_sweep"), "tiny", sweep.out, topology)
    return [point._replace(plan=PLAN) if point.topology and "train" in point.verbs else point for point in made]


def test_a_slice_is_the_experiments_or_the_commands(sweep):
    assert [point.topology for point in on_slices(sweep)] == [None] * 3
    sweep.write(SWEEP.replace('name="a"', 'name="a", topology="V5P-16"'))
    assert [point.topology for point in on_slices(sweep)] == [None, "v5p-16", None]
    assert [point.topology for point in on_slices(sweep, "2xv5e-8")] == ["2xv5litepod-8"] * 3
    assert on_slices(sweep)[1].accelerator.num_chips == 8 and on_slices(sweep)[0].accelerator is None
    assert on_slices(sweep)[1].config_hash == on_slices(sweep, "v5p-8")[1].config_hash
    for name in ("v9-8", ""):
        with pytest.raises(UserError, match=f"point 'data': unknown topology '{name}'; "):
            on_slices(sweep, name)


def test_slices_and_plans_are_frozen_and_other_lines_are_as_ever(sweep):
    sweep.write(SWEEP.replace('name="a"', 'name="a", topology="v5p-16"'))
    points.freeze(sweep.out, on_slices(sweep))
    lines = [json.loads(line) for line in (sweep.out / "points.jsonl").read_text().splitlines()]
    assert (lines[1]["topology"], lines[1]["plan"]) == ("v5p-16", PLAN)
    assert all("topology" not in line and "plan" not in line for line in (lines[0], lines[2]))
    assert points.read(sweep.out) == on_slices(sweep)
    again = [point._replace(plan={"chips": 9} if point.plan else None) for point in on_slices(sweep)]
    assert points.freeze(sweep.out, again) is False  # another libtpu's figures are no other sweep
    assert points.read(sweep.out)[1].plan == PLAN
    with pytest.raises(UserError, match=r"'a': topology was v5p-16, is v5p-8\. Name another"):
        points.freeze(sweep.out, on_slices(sweep, "v5p-8"))


def test_a_sweep_that_was_frozen_without_slices_takes_those_that_it_is_given(sweep):
    sweep.freeze()
    before = (sweep.out / "points.jsonl").read_text()
    made = on_slices(sweep, "v5p-16")
    assert points.differences(points.read(sweep.out), made) == []
    assert points.freeze(sweep.out, made[::-1]) is True
    assert points.read(sweep.out) == made  # in the order that they were frozen in
    for point, line in zip(points.read(sweep.out), before.splitlines(), strict=True):
        assert point._replace(topology=None, plan=None).line == line
    assert points.freeze(sweep.out, made) is False


def test_a_file_of_a_version_without_slices_is_what_it_was():
    """Every byte of what results are kept of: a finished run is passed over only where the hash is the same."""
    for line in (ROOT / "docs/results/pack/points.jsonl").read_text().splitlines():
        point = points.Point(**json.loads(line))
        assert point.line == line and point.topology is point.plan is point.accelerator is None
        resolved = json.dumps(config.from_dict(point.resolved).to_dict(), sort_keys=True)
        assert hashlib.sha256(resolved.encode()).hexdigest()[:16] == point.config_hash


def test_the_papers_points_each_have_a_slice_of_v5p():
    made = points.make(experiment.call("experiments/scaling.py:paper", "get_sweep"), "", Path("sweeps/paper"))
    chips = {point.tags["size"]: point.accelerator.num_chips for point in made}
    assert len(made) == 10 and list(chips.values()) == sorted(set(chips.values()))
    assert {point.accelerator.chip.name for point in made} == {"v5p"}


def test_a_default_of_the_experiment_that_changed_is_seen(sweep):
    sweep.freeze()
    sweep.write(SWEEP, EXPERIMENT.replace("    if arg", "    config.optimizer.b2 = 0.9\n    if arg"))
    with pytest.raises(UserError, match=r"'data': optimizer.b2 was 0.98, is 0.9; 'a': "):
        points.freeze(sweep.out, sweep.make())


def test_no_sweep_and_a_broken_one(sweep):
    with pytest.raises(UserError, match=r"points\.jsonl not found: `python -m tfusion.sweep"):
        points.read(sweep.out)
    sweep.freeze()
    (sweep.out / "points.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"points\.jsonl is broken"):
        points.read(sweep.out)


def test_an_experiment_without_a_sweep(tmp_path):
    (tmp_path / "x.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=r"x\.py has no get_sweep"):
        experiment.call(f"{tmp_path}/x.py", "get_sweep")
