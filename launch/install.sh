#!/usr/bin/env bash
# On a fresh machine of a cloud: .venv with what requirements.txt pins, JAX for its devices, and gcsfs for gs://
#   launch/install.sh tpu|cuda13|cuda12
# uv brings a Python of its own: the images of TPU VMs have 3.10, and 3.11 is the least that tfusion runs on.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1-} in
  tpu | cuda13 | cuda12) ;;
  *) echo "error: launch/install.sh tpu|cuda13|cuda12" >&2 && exit 1 ;;
esac
python3 -m pip install --quiet --user uv==0.13.8
uv=(python3 -m uv)
[[ -x .venv/bin/python ]] || "${uv[@]}" venv --quiet --python 3.12 .venv
jax=$(sed -n "s/^jax==/jax[$1]==/p" requirements.txt)
"${uv[@]}" pip install --quiet --python .venv/bin/python -r requirements.txt -r launch/requirements.txt "$jax"
