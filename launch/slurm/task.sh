#!/usr/bin/env bash
# What srun starts as each process of a job (train.sbatch): the verb, on this process's share of the node's GPUs.
set -euo pipefail
exec 2>&1  # srun's own words are then alone on its stderr: train.sbatch reads them
PATH="$PWD/.venv/bin:$PATH"

chip=cpu
if [[ -n "${CUDA_VISIBLE_DEVICES-}" ]]; then
  chip=gpu
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  # By itself JAX takes one GPU a process on SLURM. Where all processes of the node see all its GPUs, each takes
  # its share; where SLURM has bound some to each (--gpus-per-task), all that it sees.
  tasks=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} each=${#visible[@]} first=0
  if ((${#visible[@]} == ${SLURM_GPUS_ON_NODE:-0})); then
    each=$((${#visible[@]} / tasks)) first=$((SLURM_LOCALID * each))
  fi
  if ((each == 0)); then
    echo "error: $tasks processes share ${#visible[@]} GPUs of $(hostname): lower --ntasks-per-node" >&2
    exit 255
  fi
  JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + each - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# shellcheck source=launch/flags.sh
. launch/flags.sh "$chip"

trap : TERM  # it is for Python: this shell waits for it
status=0
python -m "tfusion.${VERB:-train}" "$@" || status=$?
# A status that is not to be restarted is told from those of processes that are stopped after it: train.sbatch.
case $status in
  0 | 42 | 134 | 137 | 139 | 143) exit "$status" ;;
  *) exit 255 ;;
esac
