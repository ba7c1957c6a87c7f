#!/usr/bin/env bash
# Trains on the devices of this host: launch/local.sh --config=experiments/quickstart.py --workdir=runs/mine
# In several processes, joined over loopback: launch/local.sh --processes=2 -- --config=... --workdir=...
# (of as many GPUs or more, each takes its share). Another verb: VERB=evaluate launch/local.sh --workdir=...
# A sweep that `python -m tfusion.sweep` froze: launch/local.sh --sweep=sweeps/x [--parallel=2] [--retry]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
run=(python -m "tfusion.${VERB:-train}")

if [[ "${1-}" == --sweep=* ]]; then
  exec python -m tfusion.sweep --run --out="${1#--sweep=}" "${@:2}"
fi

if [[ "${1-}" != --processes* ]]; then
  exec "${run[@]}" "$@"
fi
n="${1#--processes=}"
if [[ ! "$n" =~ ^[1-9][0-9]*$ || "${2-}" != -- ]]; then
  echo "error: launch/local.sh --processes=2 -- FLAGS is wanted" >&2
  exit 1
fi
shift 2

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$n"
gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
each=$((gpus / n))
declare -A left=()  # process id -> number
for ((k = 0; k < n; k++)); do
  if ((each)); then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((k * each)) $((k * each + each - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  JAX_PROCESS_ID="$k" "${run[@]}" "$@" &
  left[$!]=$k
done

# Background jobs ignore Ctrl-C: it stops them as SIGTERM does.
trap 'kill -TERM "${!left[@]}" 2>/dev/null || true' TERM INT
status=0 killer=''
while ((${#left[@]})); do
  ended='' code=0
  wait -n -p ended "${!left[@]}" || code=$?
  if [[ -z "${ended-}" ]]; then continue; fi  # a signal came, and was passed on
  k=${left[$ended]}
  unset "left[$ended]"
  if ((code && !status)); then
    status=$code
    if ((${#left[@]} && code != 42)); then  # 42: they are stopping together, and save
      echo "launch/local.sh: process $k of $n ended with status $code; the others are stopped" >&2
      (sleep 10; kill -KILL "${!left[@]}" 2>/dev/null || true) &
      killer=$!
    fi
  fi
done
if [[ -n "$killer" ]]; then kill "$killer" 2>/dev/null || true; fi
exit "$status"
