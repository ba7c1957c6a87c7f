"""A run's folder: what stands in it, and that one process at a time writes there.

    config.json            the resolved config; config_changes.jsonl   what resumes changed in it
    tokenizer.json, tokenizer.model, codec.npz       copied from the data, so that the run stands alone
    checkpoints/<step>/    metrics.jsonl    tensorboard/    summary.json    timing.json
                           (in a bucket metrics.<first step>.jsonl, in parts: nothing is appended to there)
    frozen/                trees that training reads and never changes, where it has any
    evaluation/            metrics.json, written last; <evaluator>/card.json, card.npz; steps/<step>/ (--follow)
"""

import fcntl
import json
import os
import platform
import time
from pathlib import Path

from tfusion.errors import UserError
from tfusion.paths import replace_bytes, replace_text

CODEC = "codec.npz"  # pictures <-> latents (models/codecs)
LOCK, CHANGES = ".lock", "config_changes.jsonl"


def hold(lock: Path):
    """Locks a file until what is returned is closed, or this process ends, however it does.

    Raises UserError where another process holds it.
    """
    file = lock.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = lock.read_text().strip()
        file.close()
        raise UserError(f"{lock.parent} is being written by another process ({who}): wait for it or stop it, "
                        "or name another folder") from None
    except OSError:
        return file  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def copy_in(files: list[Path], workdir: Path) -> None:
    """Copies files into a run's folder, each in one move."""
    for path in files:
        replace_bytes(workdir / path.name, path.read_bytes())


def note_changes(workdir: Path, step: int, changed: dict) -> None:
    """Adds a line to config_changes.jsonl. changed: {key: [old, new]}."""
    path = workdir / CHANGES
    old = path.read_bytes().decode(errors="replace") if path.exists() else ""
    line = {"time": round(time.time()), "step": step, "changed": changed}
    replace_text(path, old + json.dumps(line) + "\n")
