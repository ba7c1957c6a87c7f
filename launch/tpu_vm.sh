#!/usr/bin/env bash
# Rents a TPU slice, runs a verb on all its hosts by ssh, and gives it back: no cluster, no image. Stays in the
# foreground and restarts what was preempted, so run it where it can stay (tmux, a small VM).
#   TOPOLOGY=v5litepod-16 ZONE=us-west4-a [SPOT=1] launch/tpu_vm.sh --config=... --workdir=gs://...
#   VERB=evaluate ... launch/tpu_vm.sh --workdir=gs://...      prepare, sample, export likewise
#   ZONE=... launch/tpu_vm.sh --sweep=gs://... [--retry]       a slice per point that is not done, all at once
#   NAME=mine KEEP=1 TOPOLOGY=... launch/tpu_vm.sh ...    the slice stays; NAME=mine again runs the next verb on it
# v4 to v6e come as queued resources, of several slices too; tpu7x as a Compute Engine instance, of one host.
# SPOT=1: cheap, and taken away at any time. DATA=gs://...: what is in it is copied into data/ of each host.
# VALID=6h: how long to wait for a slice. PROJECT, ZONE: else gcloud's own.
# RUNTIME_VERSION: of the machines' software. SHARED, RESTARTS, ENGINE_FLAGS (of `create`): launch/jobs.sh.
# shellcheck source=launch/jobs.sh
. "$(dirname "$0")/jobs.sh"

tool flock "util-linux has it; macOS: brew install flock"
tool gcloud "install the Google Cloud CLI, then gcloud auth login"
where=(${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})
# shellcheck disable=SC2034
[[ -z "${DATA-}" ]] || copied=data
VALID=${VALID:-6h} POLL_S=${POLL_S:-30}
locks=${XDG_CACHE_HOME:-$HOME/.cache}/tfusion/slices  # a file a slice that is worked on from this machine
mkdir -p "$locks"
running=() stops=0  # process ids of this script's jobs; how often it was told to stop
# For the hosts to expand. tfusion.pid: a run's process. tfusion.mark: by which machine it is being installed; one
# that was left counts for half an hour.
# shellcheck disable=SC2016
stop='kill -TERM $(cat tfusion.pid)' me=$(printf %q "$HOSTNAME")
# shellcheck disable=SC2016
asked='if kill -0 $(cat tfusion.pid) || find tfusion.mark -mmin -30 -exec cat {} + | grep -qvxF '$me
asked+='; then echo busy; else echo idle; fi'

queued() {
  [[ "$chip" != tpu7x ]]
}

status_of() {  # NAME: what Google says of it; nothing where there is none
  local said
  if queued; then
    said=$(gcloud compute tpus queued-resources describe "$1" "${where[@]}" --format='value(state.state)' 2>&1)
  else
    said=$(gcloud compute instances describe "$1" "${where[@]}" --format='value(status)' 2>&1)
  fi || case $said in
    *NOT_FOUND* | *'was not found'*) said='' ;;
    *) die "gcloud cannot say what $1 is: $(tail -n 1 <<<"$said")" ;;
  esac
  tail -n 1 <<<"$said"
}

on() {  # NAME WORKERS COMMAND: by ssh, on all hosts at once (all) or on the first (0)
  if queued; then
    gcloud compute tpus queued-resources ssh "$1" "${where[@]}" --node="$2" --worker="$2" --batch-size=all \
      --command="$3"
  else
    gcloud compute ssh "$1" "${where[@]}" --command="$3"
  fi
}

suits() {
  machine >/dev/null
  if ! queued; then
    [[ "$chips" -le 4 && "$slices" == 1 ]] || die "launch/tpu_vm.sh runs tpu7x on one host, tpu7x-8: larger" \
      "slices by launch/gke.sh"
    [[ " ${more[*]}" == *" --image"* ]] || die "ENGINE_FLAGS='--image-family=... --image-project=...' is wanted:" \
      "the TPU image for tpu7x of Google's page 'TPU OS images'"
  fi
}

state() {
  local is
  is=$(status_of "$1") || exit 1
  case $is in
    '') ;;
    # A host that cannot be asked may well be at work.
    ACTIVE | RUNNING) [[ "$(on "$1" 0 "$asked" 2>/dev/null)" == *idle* ]] || echo live ;;
    FAILED | SUSPEND* | TERMINATED | STOP* | DELETING) ;;
    *) echo live ;;  # it is waited for
  esac
}

forget() { :; }  # `ready` sees to what is left of a slice

create() {  # NAME
  local flags=() nodes=(--node-id="$1") version
  if ! queued; then
    [[ -z "${SPOT-}" ]] || flags=(--provisioning-model=SPOT --instance-termination-action=DELETE)
    gcloud compute instances create "$1" "${where[@]}" --machine-type="$(machine)" \
      --maintenance-policy=TERMINATE --scopes=cloud-platform "${flags[@]}" "${more[@]}"
    return
  fi
  case $chip in
    v5e) version=v2-alpha-tpuv5-lite ;;
    v5p) version=v2-alpha-tpuv5 ;;
    v6e) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
  [[ "$slices" == 1 ]] || nodes=(--node-count="$slices" --node-prefix="$1")
  [[ -z "${SPOT-}" ]] || flags=(--spot)
  gcloud compute tpus queued-resources create "$1" "${where[@]}" "${nodes[@]}" --accelerator-type="$slice_name" \
    --runtime-version="${RUNTIME_VERSION:-$version}" --valid-until-duration="$VALID" "${flags[@]}" "${more[@]}"
}

delete() {  # NAME: the slice, and with it what it costs
  if queued; then
    gcloud compute tpus queued-resources delete "$1" "${where[@]}" --force --quiet
  else
    gcloud compute instances delete "$1" "${where[@]}" --quiet
  fi
}

put() {  # NAME: this code, what it needs, and DATA on all hosts
  # A run that lost its ssh may still be there: it saves first. More of the checkout is not needed there; what was
  # installed and copied before stays.
  # shellcheck disable=SC2016
  local setup='if kill -TERM $(cat tfusion.pid 2>/dev/null) 2>/dev/null; then
      while kill -0 $(cat tfusion.pid) 2>/dev/null; do sleep 1; done
    fi; mkdir -p tfusion/data && find tfusion -mindepth 1 -maxdepth 1 ! -name .venv ! -name data -exec \
    rm -rf {} + && tar -xzf tfusion.tgz -C tfusion && tfusion/launch/install.sh tpu'
  [[ -z "${DATA-}" ]] || setup+=" && gcloud storage rsync -r $(printf %q "$DATA") tfusion/data"
  on "$1" 0 "echo $me >tfusion.mark" || return
  if queued; then
    gcloud compute tpus queued-resources scp "$code/tfusion.tgz" "$1:" "${where[@]}" --node=all --worker=all \
      --batch-size=all && on "$1" all "$setup"
  else
    gcloud compute scp "$code/tfusion.tgz" "$1:" "${where[@]}" && on "$1" all "$setup"
  fi
}

ready() {  # NAME: the slice is there, with this code on it; where one was taken away another is made
  local is
  while :; do
    ((stops == 0)) || exit 42
    is=$(status_of "$1") || exit 1
    case $is in
      DELETING | STOPPING) echo "$1: $is" && sleep "$POLL_S" && continue ;;
      FAILED | SUSPEND* | TERMINATED | STOP*) delete "$1" && create "$1" ;;
      '') create "$1" ;;
    esac
    until [[ "$is" == ACTIVE || "$is" == RUNNING ]]; do
      ((stops == 0)) || exit 42
      is=$(status_of "$1") || exit 1
      case $is in
        ACTIVE | RUNNING) ;;
        FAILED | SUSPEND* | '') die "$1: no such slice within $VALID ($is): another ZONE, SPOT=1, a longer VALID" ;;
        *) echo "$1: $is" && sleep "$POLL_S" ;;
      esac
    done
    ((stops == 0)) || exit 42
    if put "$1"; then return; fi
    sleep "$POLL_S"
    is=$(status_of "$1") || exit 1
    case $is in ACTIVE | RUNNING) die "$1: installing failed, see above" ;; esac
    echo "$1: was taken away meanwhile"
  done
}

# shellcheck disable=SC2329  # a trap calls it
release() {  # NAME: gives back what there is of it; fails where it may still be there
  local is kind='tpus queued-resources'
  queued || kind=instances
  if [[ -n "${KEEP-}" ]]; then
    echo "$1: stays, and costs, until: gcloud compute $kind delete $1 ${where[*]}$(! queued || echo ' --force')"
    return
  fi
  for _ in 1 2 3; do
    if is=$(status_of "$1") && [[ -z "$is" ]]; then return; fi
    if delete "$1"; then return; fi
    sleep "$POLL_S"
  done
  echo "error: $1 may still be there, and cost: gcloud compute $kind list ${where[*]}" >&2
  return 1
}

await() {  # PID: sets its status; a wait that a signal ended begins again
  local seen=-1
  while ((seen != stops)); do
    seen=$stops status=0
    wait "$1" || status=$?
  done
}

follow() {  # NAME COMMAND: sets its status. A lost connection costs nothing: the run goes on, and is looked for again
  local again is lost=0
  again="tfusion/launch/detached.sh $BASHPID.$EPOCHREALTIME ${2@Q}"
  while :; do
    on "$1" all "$again" &
    await $!
    ((status == 255)) || return 0  # 255 is ssh's own
    sleep "$POLL_S"
    if is=$(status_of "$1"); then
      case $is in ACTIVE | RUNNING) ((lost++ < RESTARTS)) || return 0 ;; *) return 0 ;; esac
    else  # this machine has no network: as long as it takes
      ((stops == 0)) || return 0
    fi
    echo "$1: connection lost, looked for again"
  done
}

work() {  # NAME VERB FLAGS...: until it is done, or not worth a restart. A process of its own
  local name=$1 command is status stops=0 restarts=0 lock
  exec {lock}>"$locks/$1"
  if ! flock -n "$lock"; then echo "$name: queued or running, left alone" && exit; fi
  command="echo \$\$ >tfusion.pid && rm -f tfusion.mark && cd tfusion && PATH=\$PWD/.venv/bin:\$PATH && "
  command+=$(remote "${@:2}")
  # shellcheck disable=SC2064  # now: where `set -e` ends it, the trap no longer sees what is local
  trap "status=\$?; release $(printf %q "$name") || exit \$((status ? status : 1))" EXIT
  # What runs there saves, and ends with 42; then the slice is given back.
  trap 'stops=$((stops + 1)); on "$name" all "$stop" >/dev/null 2>&1 || true' TERM
  while :; do
    ready "$name"
    ((stops == 0)) || exit 42
    follow "$name" "$command"
    ((status && stops == 0)) || break
    # A slice that is gone was taken away, whatever status its connection ended with.
    if [[ ",$RESTARTED,255," != *",$status,"* ]]; then
      is=$(status_of "$name") || is=ACTIVE  # who cannot say does not make a user's error worth another try
      case $is in ACTIVE | RUNNING) break ;; esac
    fi
    if ((restarts++ >= RESTARTS)); then
      echo "error: $name: status $status after $RESTARTS restarts" >&2
      break
    fi
    echo "$name: status $status, restart $restarts of $RESTARTS"
  done
  echo "$name: ended with status $status"
  exit "$status"
}

submit() {
  if ((stops)); then
    worst=42
    return
  fi
  trap '' INT  # so it is for the job too, which a Ctrl-C would reach as well
  work "$@" &
  running+=($!)
  ((stops == 0)) || kill -TERM $!
  trap stop_all INT
}

# shellcheck disable=SC2329  # a trap calls it
stop_all() {
  stops=$((stops + 1))
  ((${#running[@]} == 0)) || kill -TERM "${running[@]}" 2>/dev/null || true
}

# shellcheck disable=SC2329  # a trap calls it
finish() {  # also where submitting ended with an error: no slice is left behind
  stop_all
  for child in "${running[@]}"; do await "$child"; done
  rm -rf "$code"
}

worst=0 code=$(mktemp -d)
trap finish EXIT
trap stop_all TERM INT
tar -czf "$code/tfusion.tgz" --exclude=__pycache__ tfusion experiments launch requirements.txt
submit_all "$@"
for child in "${running[@]}"; do
  await "$child"
  ((worst)) || worst=$status
done
running=()
exit "$worst"
