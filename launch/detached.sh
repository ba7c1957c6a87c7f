#!/usr/bin/env bash
# On a host: runs a command that outlives the connection, and follows it. `launch/tpu_vm.sh` gives it to gcloud, which
# gives it to a host again whenever its ssh fails.
#   detached.sh ID COMMAND     the first call of an ID begins it; each further one follows it, or says how it ended
# In the home folder: tfusion.id, tfusion.log, tfusion.status, once it has ended; and tfusion.running, locked while it
# runs. Ends with the command's status; 137 where it went without one, as when the host was started anew; 255, as ssh
# does, where nobody listens any more.
set -uo pipefail

exec 9>tfusion.begin
flock 9  # a second call waits until the first has begun it
if [[ "$(cat tfusion.id 2>/dev/null)" != "$1" ]]; then
  exec 8>tfusion.running
  flock 8  # one that was here before, told to save, goes first
  rm -f tfusion.status
  : >tfusion.log  # here, for `tail` ends where it finds none
  echo "$1" >tfusion.id  # before: killed between the two, it is not begun, never twice
  # shellcheck disable=SC2016
  setsid nohup bash -c 'bash -c "$1" 8>&-; echo $? >tfusion.ending; mv tfusion.ending tfusion.status' - "$2" \
    >>tfusion.log 2>&1 </dev/null 9>&- &
  exec 8>&-  # it alone holds the lock now
  lines=+1
fi
exec 9>&-
flock --shared tfusion.running true &  # not its process id, which another process may have by now
tail -n "${lines:-20}" -f --pid=$! tfusion.log
flock --shared --nonblock tfusion.running true || exit 255
exit "$(cat tfusion.status 2>/dev/null || echo 137)"
