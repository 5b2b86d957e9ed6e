#!/usr/bin/env bash
# Check a run, then start it on all GPUs of this node, or on all nodes in $HOSTFILE. If the run was started before, it
# continues from its last checkpoint.
#   launch/train.sh RUN.yaml [section.key=value ...]
#   launch/train.sh RUN.yaml train.lr=1e-4 --change train.lr      # go on with another learning rate
#   HOSTFILE=hosts PORT=29501 launch/train.sh RUN.yaml
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,6p' "$0" >&2
    exit 2
fi

where=(--master_port "${PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
    where+=(--hostfile "$HOSTFILE")
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

changes=() # options of training that the check does not know
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
    --change) changes+=("$1" "${2:?--change needs a key}") && shift 2 ;;
    --change=*) changes+=("$1") && shift ;;
    *) settings+=("$1") && shift ;;
    esac
done

salient-ds check "${settings[@]}" --gpus "$processes"
exec deepspeed "${where[@]}" --module salient_ds.train "${settings[@]}" --resume auto "${changes[@]}"
