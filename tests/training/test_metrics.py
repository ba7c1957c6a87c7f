"""Numbers out of a run: means, rates by a fake clock, memory, timing.json."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_autoencoder_config
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.objectives.autoencoder import convolution_flops
from tfusion.training import metrics
from tfusion.types import Batch, ImageBatch


def test_losses_divide_once_over_all_steps():
    losses = metrics.Losses()
    losses.add(1, {"a": (jnp.float32(3.0), jnp.float32(1.0)), "b": (0.0, 0.0)})
    losses.flush()  # a checkpoint between log lines: nothing is lost, nothing counts twice
    losses.add(2, {"a": (jnp.float32(1.0), jnp.float32(7.0)), "b": (0.0, 0)})
    losses.add(3, {"c": (5.0, 2)})
    assert losses.means("train/") == {"train/a": 0.5, "train/b": None, "train/c": 2.5}
    losses.add(4, {"a": (6.0, 2)})
    assert losses.means("") == {"a": 3.0}  # started over
    assert losses.means("") == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_names_its_step(bad):
    losses = metrics.Losses()
    losses.add(6, {"lm_loss": (1.0, 1), "diffusion_loss": (2.0, 1)})
    losses.add(7, {"lm_loss": (1.0, 1), "diffusion_loss": (jnp.float32(bad), 1)})
    losses.add(8, {"lm_loss": (np.nan, 1), "diffusion_loss": (np.nan, 1)})
    with pytest.raises(UserError, match=r"^step 7: diffusion_loss is not finite"):
        losses.flush()


@pytest.mark.parametrize("bad", ["lm_loss", "diffusion_loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_error_names_the_first_bad_step_and_loss(bad, value):
    losses = metrics.Losses()
    fine = {name: (np.float32(1), 1) for name in ("lm_loss", "diffusion_loss", "grad_norm")}
    losses.add(6, fine)
    losses.add(7, {**fine, bad: (np.float32(value), 1)})
    losses.add(8, {name: (np.float32(value), 1) for name in fine})
    with pytest.raises(UserError, match=f"^step 7: {bad} is not finite"):
        losses.flush()


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def packed(cfg):
    """A row of 10 positions: a document of 3 tokens and 4 patches, one of 1 token, 2 of padding."""
    segments = np.array([[1] * 7 + [2] + [0, 0]], np.int32)
    images = np.array([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]], np.int32)
    zeros = np.zeros_like(segments)
    latents = np.zeros((1, 2, *cfg.model.latent_shape), np.float32)
    return Batch(np.zeros(1, np.int32), zeros, segments, images, zeros, segments == 2, latents,
                 np.array([[2, 10]], np.int32), np.array([[1.0, 0.0]], np.float32),
                 np.zeros((1, 2, 2), np.uint32))


def totals(cfg, batch):
    """Of one step, as the loop counts them: on the device."""
    return jax.jit(lambda batch: kind_of(cfg).totals(cfg, batch))(batch)


def test_rates_by_a_fake_clock(cfg, clock, monkeypatch):
    asked = []
    monkeypatch.setattr(metrics.accelerators, "peak_flops_per_sec", lambda kind: asked.append(kind) or 1e6)
    speed, batch = metrics.Throughput(), packed(cfg)
    assert asked == [jax.devices()[0].device_kind]
    for _ in range(4):
        clock.now += 1.0
        speed.add(totals(cfg, batch), 0.25)
    clock.now += 6.0
    speed.pause(5.0)  # an evaluation: 10 seconds passed, 5 of them are training's
    flops, out = float(totals(cfg, batch)["flops"]), speed.report()
    assert out == pytest.approx({
        "perf/step_ms": 1e3 * 5 / 4, "perf/tokens_per_sec": 4 * 8 / 5, "perf/patches_per_sec": 4 * 4 / 5,
        "perf/images_per_sec": 4 / 5, "perf/model_flops_per_sec": 4 * flops / 5,
        "data/wait_fraction": 1.0 / 5, "total/tokens": 32, "total/patches": 16, "total/images": 4,
        "total/flops": 4 * flops, "perf/mfu": 4 * flops / 5 / (1e6 * jax.device_count())})

    clock.now += 2.0  # rates start over, totals do not
    speed.add(totals(cfg, batch), 0.0)
    out = speed.report()
    assert out["perf/step_ms"] == pytest.approx(2e3) and out["perf/tokens_per_sec"] == pytest.approx(4)
    assert speed.total == pytest.approx({"tokens": 40, "patches": 20, "images": 5, "flops": 5 * flops})


def test_a_resumed_run_counts_on_and_its_rates_do_not_hold_the_past(cfg, clock):
    speed = metrics.Throughput({"tokens": 1000, "patches": 500, "images": 70, "flops": 1e9})
    clock.now += 2.0
    speed.add(totals(cfg, packed(cfg)), 0.0)
    out = speed.report()
    assert out["perf/tokens_per_sec"] == pytest.approx(4) and out["perf/images_per_sec"] == pytest.approx(0.5)
    assert out["total/tokens"] == speed.total["tokens"] == 1008
    assert out["total/images"] == speed.total["images"] == 71
    assert "perf/mfu" not in out  # a CPU has no known peak


def test_totals_are_fetched_when_they_are_wanted_and_stay_whole(clock):
    """Adding waits for no device; whole numbers are added as whole numbers, beyond what float32 holds."""
    speed = metrics.Throughput({"tokens": 2**40})
    for _ in range(3):
        speed.add({"tokens": jnp.int32(1), "flops": jnp.float32(0.5), "rows": 2}, 0.0)
    assert speed.total == {"tokens": 2**40}
    clock.now += 1.0
    report = speed.report()
    assert speed.total == {"tokens": 2**40 + 3, "flops": 1.5, "rows": 6}
    assert type(speed.total["tokens"]) is type(speed.total["rows"]) is int
    assert report["perf/tokens_per_sec"] == 3 and report["total/tokens"] == 2**40 + 3
    json.dumps(report)


def test_the_autoencoders_batches_count_images(clock):
    cfg, speed = tiny_autoencoder_config(), metrics.Throughput()
    batch = ImageBatch(np.arange(6, dtype=np.int32), np.zeros((6, 32, 32, 3), np.uint8))
    speed.add(totals(cfg, batch), 0.5)
    clock.now += 2.0
    flops = 6 * convolution_flops(cfg.autoencoder)
    assert speed.report() == pytest.approx(
        {"perf/step_ms": 2e3, "perf/images_per_sec": 3.0, "data/wait_fraction": 0.25, "total/images": 6,
         "total/flops": flops, "perf/model_flops_per_sec": flops / 2})


def test_clip_rate_is_the_share_of_steps_above_the_clip():
    losses = metrics.Losses()
    for step, norm in enumerate((0.5, 1.0, 1.01, 30.0, 0.2), start=1):  # clipped at 1.0
        losses.add(step, {"lm_loss": (1.0, 1), "grad_norm": (jnp.float32(norm), 1)})
    assert losses.means("train/")["train/clip_rate"] == pytest.approx(0.4)
    losses.add(6, {"lm_loss": (1.0, 1)})  # an evaluation has no gradient
    assert losses.means("eval/") == {"eval/lm_loss": 1.0}


def test_memory_is_that_of_the_fullest_device():
    gib = 2**30
    full = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2 * gib, "peak_bytes_in_use": 3 * gib})
    less = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": gib, "peak_bytes_in_use": 4 * gib})
    none = SimpleNamespace(memory_stats=lambda: None)
    assert metrics.device_memory([full, less]) == {"memory/in_use_gib": 2.0, "memory/peak_gib": 4.0}
    assert metrics.device_memory([none, none]) == metrics.device_memory(jax.devices("cpu")) == {}


def test_timing_keeps_other_stages_and_replaces_its_own(tmp_path):
    metrics.write_timing(tmp_path, "train", 1.26)
    metrics.write_timing(tmp_path, "train from step 4", 2.0)
    metrics.write_timing(tmp_path, "train", 3.0)
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert {s["name"]: s["seconds"] for s in timing["stages"]} == {"train from step 4": 2.0, "train": 3.0}
    assert len(timing["stages"]) == 2 and all(10 < s["peak_memory_mb"] < 1e6 for s in timing["stages"])
    assert f"{jax.device_count()} x" in timing["machine"] and timing["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("broken", [
    b"", b"{", b'{"stages": [{"name": "train"', b"null", b"[]", b"{}", b"\xff\xfe\x00", b"\x00" * 64,
    b'{"stages": null}', b'{"stages": [7, {"name": "train"}]}'])
def test_broken_timing_stops_no_run(tmp_path, broken):
    (tmp_path / "timing.json").write_bytes(broken)
    metrics.write_timing(tmp_path, "evaluate", 2.0)
    assert [s["name"] for s in json.loads((tmp_path / "timing.json").read_text())["stages"]] == ["evaluate"]
    assert [p.name for p in tmp_path.iterdir()] == ["timing.json"]
