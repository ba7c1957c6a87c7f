"""Two processes write the export that one would."""

import numpy as np
import pytest

from tests.processes import running, succeed
from tfusion import exported
from tfusion.exporting import place


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, llama_export, tmp_path):
    flags = f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", "--format=llama"
    with running(2, "tfusion.export", *flags, devices_per_process=2) as processes:
        succeed(processes)
        said = [process.stdout() for process in processes]
    assert f"wrote {tmp_path / 'out'}\n" in said[0] and "wrote" not in said[1]
    ours, want = exported.Tensors(tmp_path / "out"), exported.Tensors(llama_export)
    assert ours.names() == want.names() and exported.about(tmp_path / "out") == exported.about(llama_export)
    for name in want.names():
        np.testing.assert_array_equal(ours.read(name), want.read(name))
    assert not (tmp_path / f"out{place.UNFINISHED}").exists()
