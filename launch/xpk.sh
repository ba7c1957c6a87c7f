#!/usr/bin/env bash
# Submits to TPUs of a GKE cluster that still has xpk (1.16.0), which Google gives up for Cluster Toolkit (gke.sh).
#   TOPOLOGY=v5p-256 IMAGE=... CLUSTER=... ZONE=... launch/xpk.sh --config=... --workdir=gs://...
#   IMAGE=... CLUSTER=... ZONE=... launch/xpk.sh --sweep=gs://... [--retry]
# VERB, SHARED, RESTARTS, GRACE and ENGINE_FLAGS as in gke.sh; PROJECT and ZONE may stand in gcloud's own config.
# shellcheck source=launch/jobs.sh
. "$(dirname "$0")/jobs.sh"

tool xpk "pip install xpk==1.16.0, in an environment of its own"
wanted CLUSTER "the GKE cluster"
check_image
where=(--cluster="$CLUSTER" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})

list() {  # STATUS: names, one a line
  local table
  table=$(xpk workload list "${where[@]}" --filter-by-status="$1") || die "xpk workload list failed: $table"
  awk '{ print $1 }' <<<"$table"
}
everything=$(list EVERYTHING) failed=$(list FAILED) successful=$(list SUCCESSFUL)

suits() { machine >/dev/null; }

state() {
  if grep -qxF -- "$1" <<<"$failed"; then echo failed
  elif grep -qxF -- "$1" <<<"$successful"; then echo ended
  elif grep -qxF -- "$1" <<<"$everything"; then echo live; fi
}

forget() {
  xpk workload delete "${where[@]}" --workload="$1"
}

submit() {
  local command
  command=$(remote "${@:2}")
  # By itself xpk restarts nothing; told to, it restarts 42 and 127 to 255 besides our list. 1 is in neither.
  xpk workload create "${where[@]}" --workload="$1" --docker-image="$IMAGE" --command="$command" \
    --tpu-type="$slice_name" --num-slices="$slices" --max-restarts="$RESTARTS" \
    --restart-on-exit-codes="$RESTARTED" -tgps="$GRACE" "${more[@]}"
}

submit_all "$@"
