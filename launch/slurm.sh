#!/usr/bin/env bash
# Submits the points of a sweep that are to be run now, as an array of jobs; again, it submits what has become
# ready or was not there, and leaves alone what is queued or runs. Further flags are sbatch's:
#   launch/slurm.sh --sweep=sweeps/x --nodes=2 --gpus-per-node=8 --time=24:00:00
#   launch/slurm.sh --sweep=sweeps/x --retry ...      those that failed too
# A point that names a topology of GPUs (h100-16) gets that many. RESTARTS, and what a job does:
# launch/slurm/train.sbatch.
# shellcheck source=launch/jobs.sh
. "$(dirname "$0")/jobs.sh"

tool sbatch "this is to be run where jobs are submitted"
[[ "${1-}" == --sweep=?* ]] || die "launch/slurm.sh --sweep=DIR [--retry] [flags of sbatch] is wanted"
out=${1#--sweep=} retry=() given=()
out=${out%/}
for flag in "${@:2}"; do
  case $flag in
    --retry) retry=(--retry) ;;
    --array | --array=* | -a*) die "$flag: which points there are to run is this script's to say" ;;
    *) given+=("$flag") ;;
  esac
done

# The name tells this sweep's jobs from others': by where it lies.
where=$out
[[ "$out" == gs://* ]] || where=$(realpath --canonicalize-missing "$out")
name=$(job_name "${out##*/}" "$where")
jobs=$(squeue --me --noheader --array --name="$name" --format='%K %T') || die "squeue failed"
declare -A queued=() points=() machines=() names=()
while read -r index state; do
  if [[ -n "$index" ]]; then queued[$index]=$state; fi
done <<<"$jobs"
listed=$(python -m tfusion.sweep --jobs --out="$out" "${retry[@]}")
while IFS=$'\t' read -r index point topology <&3; do
  if [[ -z "$index" ]]; then continue; fi
  if [[ -n "${queued[$index]-}" ]]; then
    echo "$point: ${queued[$index]}, left alone"
  else
    if [[ -n "$topology" ]]; then  # all are looked at before the first is submitted
      slice "$topology"
      [[ "$chip" != v* && "$chip" != tpu* ]] || die "$topology is no slice of GPUs: launch/gke.sh submits to TPUs"
      machines[$topology]="--nodes=$(((chips + 7) / 8)) --gpus-per-node=$((chips < 8 ? chips : 8))"
    fi
    names[${topology:-none}]+="$point: submitted"$'\n'
    points[${topology:-none}]+="${points[${topology:-none}]+,}$index"
  fi
done 3<<<"$listed"

log=()
if [[ -d "$out" ]]; then log=("--output=$out/slurm-%A_%a.log"); fi  # else it is in a bucket
for topology in "${!points[@]}"; do
  read -r -a size <<<"${machines[$topology]-}"
  sbatch --job-name="$name" --array="${points[$topology]}" --export=ALL,VERB=sweep "${log[@]}" "${size[@]}" \
    "${given[@]}" launch/slurm/train.sbatch --out="$out"
  printf %s "${names[$topology]}"
done
