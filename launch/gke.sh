#!/usr/bin/env bash
# Submits to TPUs of a GKE cluster by Cluster Toolkit (gcluster job submit: a JobSet, queued by Kueue).
#   TOPOLOGY=v5p-256 IMAGE=... CLUSTER=... LOCATION=... launch/gke.sh --config=... --workdir=gs://...
#   VERB=evaluate ... launch/gke.sh --workdir=gs://...      prepare, sample, export likewise
#   IMAGE=... CLUSTER=... launch/gke.sh --sweep=gs://... [--retry]     a job per point that is not done
# TOPOLOGY may be of several slices (2xv5p-256). CLUSTER, LOCATION and PROJECT may stand in `gcluster job config`.
# SHARED=/data: a folder that pods see under this path, as ENGINE_FLAGS='--mount=gs://B;/data;rw' makes it
# of the whole bucket B (no folder of it), for root (build the image with UID=0).
# RESTARTS, GRACE (seconds), ENGINE_FLAGS: launch/jobs.sh. Flags as in cluster-toolkit 1.95.0 and the migration
# guide from xpk of 1.103.0.
# shellcheck source=launch/jobs.sh
. "$(dirname "$0")/jobs.sh"

bundle="take the bundle of release 1.103.0 or newer from Cluster Toolkit's page and put gcluster on PATH"
tool gcluster "$bundle"
# An older one restarts every status, also 1, the user's error.
version=$(gcluster --version | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1) || true
printf '%s\n' 1.103.0 "$version" | sort -VC || die "gcluster is ${version:-of no known version}: $bundle"
check_image
where=(${CLUSTER:+"--cluster=$CLUSTER"} ${LOCATION:+"--location=$LOCATION"} ${PROJECT:+"--project=$PROJECT"})
jobs=$(gcluster job list "${where[@]}") || die "gcluster job list failed: is the cluster there, and yours?"

suits() { machine >/dev/null; }

state() {
  case $(awk -v name="$1" '$1 == name { print $2 }' <<<"$jobs") in
    '') ;;
    Succeeded | Completed) echo ended ;;
    Failed) echo failed ;;
    *) echo live ;;  # Pending, Running, Suspended (Kueue's queue), Evicted, ...
  esac
}

forget() {  # a job that ended keeps its name for an hour, and a second one of it is refused
  gcluster job cancel "$1" "${where[@]}"
}

submit() {
  local type command flags=()
  # The machine and the shape, never a name: gcluster reads the number in v5p-256 as chips, Google as cores.
  type=$(machine)
  command=$(remote "${@:2}")
  # One process a VM. By itself gcluster makes two containers, each with two of the four chips.
  [[ "$chip" != tpu7x ]] || flags+=(--gke-disable-parallel-containers)
  # Without the list every status is restarted, also 1, the user's error.
  gcluster job submit "${where[@]}" --name="$1" --image="$IMAGE" --command="$command" \
    --compute-type="$type" --topology="$shape" --num-slices="$slices" "${flags[@]}" \
    --restarts="$RESTARTS" --restart-on-exit-codes="$RESTARTED" --grace-period="${GRACE}s" "${more[@]}"
}

submit_all "$@"
