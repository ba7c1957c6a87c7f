#!/usr/bin/env bash
# Trains on the devices of this host: launch/local.sh --config=experiments/quickstart.py --workdir=runs/mine
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
exec python -m tfusion.train "$@"
