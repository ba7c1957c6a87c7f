#!/usr/bin/env bash
# Submits managed jobs of SkyPilot (0.14.1): TPU VMs, or machines with GPUs of the clouds that `sky check` lists.
#   TOPOLOGY=h100-16 launch/sky.sh --config=... --workdir=gs://...      two machines of eight
#   TOPOLOGY=v6e-8 VERB=evaluate launch/sky.sh --workdir=gs://...       prepare, sample, export likewise
#   TOPOLOGY=... launch/sky.sh --sweep=gs://... [--retry]               a job per point that is not done
# SPOT=1: cheap machines that may be taken away. DEVICE=cuda12: for older drivers. SHARED, RESTARTS, ENGINE_FLAGS (of `sky jobs launch`,
# such as --infra=gcp/us-central1): launch/jobs.sh. What a job does: launch/sky/task.yaml.
# shellcheck source=launch/jobs.sh
. "$(dirname "$0")/jobs.sh"

tool sky "pip install 'skypilot[gcp]==0.14.1', in an environment of its own, then sky check"
SPOT=${SPOT-}
task=$(mktemp)
trap 'rm -f "$task"' EXIT
# Newest first: a name may have been used by several jobs.
said=$(sky jobs queue --all --output=json) || die "sky jobs queue failed: $(tail -n 1 <<<"$said")"
queue=$(python -c 'import json, re, sys
text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", sys.stdin.read())  # of the colours of what it says before
begin = re.search(r"^\[\s*[]{]", text, re.M)
jobs, _ = json.JSONDecoder().raw_decode(text[begin.start() if begin else 0:])
for job in sorted(jobs, key=lambda job: -job["job_id"]):
    print(job["job_name"], job["status"])' 2>/dev/null <<<"$said") ||
  die "sky jobs queue --output=json says no JSON: $(tail -n 1 <<<"$said")"

state() {
  case $(awk -v name="$1" '$1 == name { print $2; exit }' <<<"$queue") in
    '') ;;
    SUCCEEDED) echo ended ;;
    FAILED* | CANCELLED) echo failed ;;
    *) echo live ;;
  esac
}

forget() { :; }  # a name may be used again

accelerators() {  # how SkyPilot calls a machine of the slice, and how many
  local gpus=$((chips > 8 ? 8 : chips))
  case $chip in
    v4 | v5e | v5p | v6e)
      [[ "$slices" == 1 ]] || die "SkyPilot gives one slice a job: several by launch/gke.sh or launch/tpu_vm.sh"
      echo "tpu-$slice_name:1"
      ;;
    a100) echo "A100-80GB:$gpus" ;;
    h100 | h200) echo "${chip^^}:$gpus" ;;
    *) die "SkyPilot 0.14.1 has no $chip: launch/gke.sh" ;;
  esac
}

suits() { accelerators >/dev/null; }

submit() {  # NAME VERB FLAGS...
  local device=tpu nodes=1 accelerators version='' args
  accelerators=$(accelerators)
  case $chip in
    v4) version=tpu-ubuntu2204-base ;;
    v5e) version=v2-alpha-tpuv5-lite ;;  # SkyPilot's own choice is v5p's
    v5p) version=v2-alpha-tpuv5 ;;
    v6e) version=v2-alpha-tpuv6e ;;
    *) device=${DEVICE:-cuda13} nodes=$(((chips + 7) / 8)) ;;
  esac
  sed -e "s/^num_nodes: .*/num_nodes: $nodes/" -e "s/^  accelerators: .*/  accelerators: $accelerators/" \
    -e "s/^  use_spot: .*/  use_spot: $([[ -n "$SPOT" ]] && echo true || echo false)/" \
    -e "s/^  accelerator_args: .*/${version:+  accelerator_args: {runtime_version: $version\}}/" \
    launch/sky/task.yaml >"$task"
  printf -v args '%q ' "${@:3}"
  sky jobs launch --name="$1" --detach-run --yes --env="VERB=$2" --env="ARGS=$args" --env="CHIP=$chip" \
    --env="DEVICE=$device" --env="RESTARTS=$RESTARTS" --env="JAX_COMPILATION_CACHE_DIR=$cache" "${more[@]}" "$task"
}

submit_all "$@"
