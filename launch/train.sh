#!/usr/bin/env bash
# Check a run, then start it on all GPUs of this node, or on all nodes in $HOSTFILE. If the run was started before, it
# continues from its last checkpoint.
#   launch/train.sh RUN.yaml [section.key=value ...]
#   launch/train.sh RUN.yaml train.lr=1e-4 --change train.lr      # go on with another learning rate
#   HOSTFILE=hosts PORT=29501 launch/train.sh RUN.yaml
#   RESTARTS=5 launch/train.sh RUN.yaml                           # start it again after failures, up to 5 times
#   RESTARTS=5 SHRINK=1 HOSTFILE=hosts launch/train.sh RUN.yaml   # on the nodes that still answer over ssh
# It is not started again if there is no newer checkpoint than at the failure before, after status 2 (the command or the
# run file is wrong), and after status 75 (train.stop_after or a signal: a checkpoint is saved).
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,10p' "$0" >&2
    exit 2
fi

RESTARTS=${RESTARTS:-0}
case "$RESTARTS" in
'' | *[!0-9]*) echo "error: RESTARTS=$RESTARTS is no whole number" >&2 && exit 2 ;;
esac

changes=() # options of training that the check does not know
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
    --change) changes+=("$1" "${2:?--change needs a key}") && shift 2 ;;
    --change=*) changes+=("$1") && shift ;;
    *) settings+=("$1") && shift ;;
    esac
done

choose_devices() { # sets where, processes
    where=(--quiet --master_port "${PORT:-29500}")
    if [ -n "${HOSTFILE:-}" ]; then
        where+=(--hostfile "$HOSTFILE")
        # pdsh would wait for ever for a node whose cable was cut
        export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
        processes=$(awk -F 'slots=' '!/^[[:space:]]*#/ && NF > 1 { sum += $2 } END { print sum + 0 }' "$HOSTFILE")
    elif command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --list-gpus | wc -l) && [ "$gpus" -gt 0 ]; then
        where+=(--num_gpus "$gpus")
        processes=$gpus
    else
        export DS_ACCELERATOR=cpu
        processes=${PROCESSES:-2}
        where+=(--num_accelerators "$processes")
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / processes > 0 ? $(nproc) / processes : 1))}"
    fi
}

# A hostfile of the nodes that answer, in $HOSTFILE from now on. The user's own file stays as it is.
leave_out_silent_nodes() {
    local answering
    answering=$(mktemp)
    while read -r host slots rest; do
        case "$host" in '' | '#'*) continue ;; esac
        if ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null; then
            echo "$host $slots" >>"$answering"
        else
            echo "$host does not answer over ssh: it is left out" >&2
        fi
    done <"$HOSTFILE"
    [ -s "$answering" ] || { echo "error: no node in $HOSTFILE answers over ssh" >&2 && exit 1; }
    HOSTFILE=$answering
}

train=(--module salient_ds.train "${settings[@]}" --resume auto "${changes[@]}")
choose_devices
salient-ds check "${settings[@]}" --gpus "$processes" --resume auto
[ "$RESTARTS" -gt 0 ] || exec deepspeed "${where[@]}" "${train[@]}"

stopped=0
forward() { # to the launcher of the node, which passes the signal on; over ssh, DeepSpeed's first process does that
    stopped=1
    if [ -n "${HOSTFILE:-}" ]; then kill -TERM "$launcher"; else pkill -TERM -P "$launcher" || true; fi
}
trap forward TERM INT

before=
for ((restart = 0; ; restart++)); do
    deepspeed "${where[@]}" "${train[@]}" &
    launcher=$!
    status=0
    wait "$launcher" || status=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait
        status=0
        wait "$launcher" || status=$?
    done
    case "$status" in 0 | 2 | 75) exit "$status" ;; esac
    [ "$stopped" = 0 ] || exit "$status"
    step=$(salient-ds last-step "${settings[@]}")
    if [ "$restart" -ge "$RESTARTS" ]; then
        echo "error: the run failed with status $status and was started again $restart times (RESTARTS=$RESTARTS)" >&2
        exit "$status"
    elif [ "$step" = "$before" ]; then
        echo "error: the run failed twice with no checkpoint after step $step in between: it is not started again." \
            "Look at the messages above; --resume PATH begins from an earlier checkpoint" >&2
        exit "$status"
    fi
    before=$step
    echo "the run failed with status $status; its last checkpoint is of step $step:" \
        "start $((restart + 1)) of $RESTARTS" >&2
    sleep "${RESTART_DELAY:-5}" # ports of processes that just ended
    if [ -n "${HOSTFILE:-}" ] && [ -n "${SHRINK:-}" ]; then
        leave_out_silent_nodes
        choose_devices
        salient-ds check "${settings[@]}" --gpus "$processes" --resume auto
    fi
done
