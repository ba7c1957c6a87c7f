# shellcheck shell=bash
# Sourced by gke.sh, xpk.sh, tpu_vm.sh and sky.sh: which jobs there are to submit, what each is called and runs,
# and what can be found wrong before.
#
# Their settings are variables (each script lists its own), their arguments the flags of a verb, or --sweep=DIR
# [--retry] for a job per point that `python -m tfusion.sweep --jobs` names. NAME: a single job's, instead of one
# made of its verb and workdir. An engine defines
#   suits                 ends with one line where it has no such slice
#   state NAME            prints nothing where it has no such job, else live, ended or failed
#   forget NAME           removes what is left of a job that ended, where its name would be in the way
#   submit NAME VERB FLAGS...    with chip, shape, chips, slices, slice_name and RESTARTED set, as for suits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"

RESTARTS=${RESTARTS:-20}  # of one job, at most
GRACE=${GRACE:-600}       # seconds from SIGTERM to SIGKILL: longer than a step and a save together
# shellcheck disable=SC2034  # it is for the scripts, as are `cache` and what `slice` sets
read -r -d '' -a more <<<"${ENGINE_FLAGS-}" || true  # further flags of the engine's own command
copied=''  # a folder of each host's own disk that data are copied into before a run: tpu_vm.sh

die() {
  echo "error: $*" >&2
  exit 1
}

case ${VERB:-train} in
  train | prepare | sample | evaluate | export | sweep) ;;
  *) die "VERB=$VERB is no verb: train, prepare, sample, evaluate or export" ;;
esac
for number in RESTARTS GRACE; do
  [[ "${!number}" =~ ^(0|[1-9][0-9]*)$ ]] || die "$number=${!number} is no whole number"
done

tool() {  # NAME HOW: it must be there
  command -v "$1" >/dev/null || die "$1 not found: $2"
}

wanted() {  # NAME WHAT: a variable must be set
  [[ -n "${!1-}" ]] || die "$1 is not set: $2"
}

declare -A known=()  # what `slice` has been asked
slice() {  # TOPOLOGY: sets what it is, and RESTARTED; an unknown one ends with the nearest names
  [[ -n "${known[$1]-}" ]] || known[$1]=$(python - "$1" <<'END'
import sys
from tfusion.accelerators import parse_accelerator
from tfusion.errors import RESTARTED, UserError
try:
    it = parse_accelerator(sys.argv[1])
except UserError as e:
    sys.exit(f"error: {e}")
count = it.chips_per_slice * it.chip.count_per_chip
print(it.chip.name, it.topology, it.chips_per_slice, it.num_slices, f"{it.chip.prefixes[0]}{count}",
      ",".join(map(str, RESTARTED)))
END
  ) || exit 1
  # shellcheck disable=SC2034
  read -r chip shape chips slices slice_name RESTARTED <<<"${known[$1]}"
}

check_config() {  # TOPOLOGY FLAGS...: train knows the flags, the config is valid, its mesh suits the slice
  python - "$@" <<'END' || exit 1
import re
import sys
from tfusion import experiment, train
from tfusion.accelerators import parse_accelerator
from tfusion.errors import UserError, run
from tfusion.objectives import check_mesh
from tfusion.planning.topology import abstract_mesh
accelerator = parse_accelerator(sys.argv.pop(1))
def check():
    if train.CONFIG.value is None:
        raise UserError("train needs --config=experiments/FILE.py")
    cfg = experiment.read(train.CONFIG)
    check_mesh(cfg, abstract_mesh(cfg.mesh, accelerator))
# The bucket is the workers' to open: here it takes no package for it.
sys.argv[1:] = [re.sub("^(--?workdir=)?gs://", r"\1/gs/", word) for word in sys.argv[1:]]
run(check)
END
}

machine() {  # Google's name of one VM of a TPU slice; a VM of a v5e or v6e slice of several holds four chips
  local each=$((chips > 8 ? 4 : chips))
  case $chip in
    v4) echo ct4p-hightpu-4t ;;
    v5e) echo "ct5lp-hightpu-${each}t" ;;
    v5p) echo ct5p-hightpu-4t ;;
    v6e) echo "ct6e-standard-${each}t" ;;
    tpu7x) echo "tpu7x-standard-$((chips == 1 ? 1 : 4))t" ;;
    *) die "$chip is no TPU: for GPUs launch/sky.sh or launch/slurm" ;;
  esac
}

value() {  # FLAG FLAGS...: the last value of --FLAG=..., or of --FLAG ...
  local flag=$1 found='' word next=''
  shift
  for word; do
    if [[ -n "$next" ]]; then found=$word next=''
    elif [[ "$word" == --"$flag" ]]; then next=1
    elif [[ "$word" == --"$flag"=* ]]; then found=${word#*=}; fi
  done
  echo "$found"
}

job_name() {  # TEXT KEY: readable, the same for the same key, another for another, at most 28 characters
  local text
  text=$(LC_ALL=C tr '[:upper:]' '[:lower:]' <<<"$1" | LC_ALL=C tr -cs '[:alnum:]' - | sed 's/^-*//; s/^[0-9]/p&/')
  text=${text:0:19}
  text=${text:-p}
  printf '%s-%08x' "${text%-}" "$(cksum <<<"$2" | cut -d' ' -f1)"
}

reachable() {  # VERB FLAGS...: folders that workers read and write must be where they see them
  local verb=$1 flag path must=''
  shift
  case $verb in
    train | sample | evaluate | export) must=workdir ;;
    prepare) must=config.data.prepared ;;
  esac
  for flag in workdir out codec config.data.prepared; do
    path=$(value "$flag" "$@")
    if [[ -z "$path" ]]; then
      [[ "$flag" != "$must" ]] || die "$verb needs --$flag=gs://..., or a folder under SHARED: what a job writes" \
        "on its own disk is lost"
      continue
    fi
    if [[ "$path" == gs://?* || (-n "${SHARED-}" && "$path/" == "${SHARED%/}"/*) ]]; then continue; fi
    # What is only read may be copied there before.
    if [[ -n "$copied" && "$path/" == "$copied"/* && "$flag" != "$must" && "$flag" =~ ^(codec|config.*)$ ]]; then
      continue
    fi
    die "--$flag=$path: workers do not see this machine's folders; name a bucket (gs://...), or set SHARED to" \
      "the folder above it that they see under the same path"
  done
}

remote() {  # VERB FLAGS...: what a job runs on a TPU, for bash -c. `exec`: Python itself gets the SIGTERM
  (
    # shellcheck source=launch/flags.sh
    . launch/flags.sh "$chip"
    printf 'export LIBTPU_INIT_ARGS=%q' "$LIBTPU_INIT_ARGS"
  )
  # Shared by all hosts, so that a job that is restarted finds its program compiled.
  [[ -z "$cache" ]] || printf ' JAX_COMPILATION_CACHE_DIR=%q' "$cache"
  printf "; python -c 'import tfusion' || { echo 'error: this image has no tfusion that its Python can import: "
  printf "build it with the Dockerfile' >&2; exit 1; }; exec python -m tfusion.%s" "$1"
  shift
  printf ' %q' "$@"
}

check_image() {  # where the image is on this machine it is tried before anything is submitted
  wanted IMAGE "the image that jobs run, such as us-docker.pkg.dev/PROJECT/REPOSITORY/tfusion:TAG (launch/README.md)"
  if command -v docker >/dev/null && docker image inspect "$IMAGE" >/dev/null 2>&1; then
    docker run --rm --entrypoint python "$IMAGE" -c 'import tfusion' >/dev/null 2>&1 ||
      die "IMAGE=$IMAGE cannot import tfusion: build it with the Dockerfile"
  fi
}

consider() {  # AGAIN NAME VERB FLAGS...: submits unless there is such a job; AGAIN: one that failed too
  local again=$1 name=$2 is
  is=$(state "$name") || exit 1
  case $is in
    live) echo "$name: queued or running, left alone" && return ;;
    failed)
      if [[ -z "$again" ]]; then echo "$name: failed; --retry submits it again" && return; fi
      forget "$name"
      ;;
    ended) forget "$name" ;;
  esac
  echo "$name: $slice_name$([[ "$slices" == 1 ]] || echo " x $slices"), ${*:3}"
  submit "${@:2}"
}

submit_all() {  # FLAGS... of a verb, or --sweep=DIR [--retry]
  local verb=${VERB:-train} given=${TOPOLOGY-} workdir out listed again='' point topology
  if [[ "${1-}" != --sweep=* ]]; then
    wanted TOPOLOGY "the slice, such as v5litepod-16 or v5p-256"
    slice "$given"
    suits
    reachable "$verb" "$@"
    [[ "$verb" != train ]] || check_config "$given" "$@"
    workdir=$(value workdir "$@")
    workdir=${workdir%/}
    cache=${workdir:+${workdir%/*}/compilation_cache}
    consider again "${NAME:-$(job_name "$verb-${workdir##*/}" "$verb ${workdir:-$*}")}" "$verb" "$@"
    return
  fi
  out=${1#--sweep=}
  out=${out%/}
  reachable sweep "--out=$out"
  listed=$(python -m tfusion.sweep --jobs --out="$out" "${@:2}")
  [[ -n "$listed" ]] || return 0
  cache=$out/compilation_cache
  while IFS=$'\t' read -r _ point topology <&3; do  # all of them, before the first is submitted
    topology=${topology:-$given}
    [[ -n "$topology" ]] || die "point '$point' names no topology: TOPOLOGY=v5p-256, or freeze the sweep with one"
    slice "$topology"
    suits
  done 3<<<"$listed"
  [[ " ${*:2} " != *" --retry "* ]] || again=again
  while IFS=$'\t' read -r _ point topology <&3; do
    slice "${topology:-$given}"
    consider "$again" "$(job_name "$point" "$out $point")" sweep "--out=$out" "--point=$point"
  done 3<<<"$listed"
}
