"""Writes tests/testdata anew: parameters of every experiment, and the golden losses. Look at the diff.

  python -m tests.update_golden
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python tests/update_golden.py` works too

from tests import golden, test_config


def main() -> None:
    for old in test_config.TESTDATA.glob("*.txt"):
        old.unlink()
    for experiment, variant in test_config.EXPERIMENTS:
        path = test_config.golden_path(experiment, variant)
        path.write_text(test_config.describe(experiment, variant))
        print(path.relative_to(test_config.ROOT))
    golden.write_losses()
    print(golden.LOSSES.relative_to(test_config.ROOT))


if __name__ == "__main__":
    main()
