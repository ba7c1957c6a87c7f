"""A run whose folder is a bucket: trained, preempted, resumed, evaluated, sampled and reported there.

The bucket is an emulator of Cloud Storage on this machine, spoken to by the real clients, tensorstore's and
gcsfs; what a real one alone can show (credentials, quotas, latency) is not tried.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import tiny_dict

ROOT = Path(__file__).parents[1]
RUN = "gs://bucket/runs/tiny"
EMULATOR = ("import sys, time\nfrom gcp_storage_emulator.server import create_server\n"
            "create_server('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()\n"
            "time.sleep(3600)\n")


@pytest.fixture(scope="module")
def emulator():
    """(variables that lead every client to it, its files)."""
    pytest.importorskip("gcp_storage_emulator", reason="pip install gcsfs gcp-storage-emulator")
    gcsfs = pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", EMULATOR, str(port)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("localhost", port), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    url = f"http://localhost:{port}"
    yield ({**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
            "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url},
           gcsfs.GCSFileSystem(endpoint_url=url, token="anon", use_listings_cache=False))
    process.kill()


def steps(texts: list[str]) -> list[int]:
    return [json.loads(line)["step"] for text in texts for line in text.splitlines()]


@pytest.mark.slow
def test_a_run_in_a_bucket(prepared_root, tmp_path, emulator):
    environment, files = emulator
    tree = tiny_dict(prepared_root)
    tree.train.update(num_steps=40, checkpoint_every=10, log_every=1, eval_every=20, diagnostics_every=20)
    experiment, said = tmp_path / "tiny.py", tmp_path / "said"
    experiment.write_text("import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config(arg=None):\n"
                          f"    return ConfigDict(json.loads({json.dumps(tree.to_dict())!r}))\n")

    def verb(name: str, *flags: str):
        command = [sys.executable, "-m", f"tfusion.{name}", *flags]
        with said.open("w") as out:  # no pipe: gcsfs says much, and nobody reads meanwhile
            return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out,
                                    stderr=subprocess.STDOUT)

    def ended(process, status: int = 0) -> str:
        assert process.wait(400) == status, said.read_text()[-3000:]
        return said.read_text()

    def lines() -> list[str]:
        return [files.cat(path).decode() for path in sorted(files.glob(f"{RUN}/metrics.*.jsonl"))]

    train = f"--config={experiment}", f"--workdir={RUN}"
    process = verb("train", *train)
    while not files.glob(f"{RUN}/checkpoints/*/commit_success.txt"):
        assert process.poll() is None, said.read_text()[-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "it is saved" in ended(process, 42)
    stopped = steps(lines())
    assert stopped == list(range(1, len(stopped) + 1)) and 10 <= len(stopped) < 40
    assert f"resumed from step {len(stopped)}" in ended(verb("train", *train))
    assert steps(lines()) == list(range(1, 41)), "none lost, none twice"
    assert len(files.glob(f"{RUN}/tensorboard/*")) >= 2
    ended(verb("evaluate", f"--workdir={RUN}", "--number=4"))
    ended(verb("sample", f"--workdir={RUN}", "--prompt=a"))
    ended(verb("report", f"--workdir={RUN}"))
    assert {path.rpartition("/")[2] for path in files.ls(RUN, detail=False)} >= {
        "config.json", "checkpoints", "evaluation", "samples", "report.html", "summary.json", "timing.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "tiny.py"], "nothing here is named gs:"
