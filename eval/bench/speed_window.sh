#!/usr/bin/env bash
# Everything that waits for a GPU, in one window of some 490 s: tests of kernels, parts, then whole steps of arms beside
# what they are compared with. The order is the order of value; what does not fit in time is named in the record.
# SECONDS, default 440, is when the last arm may start.
#
#     OUT=out bash eval/bench/speed_window.sh [SECONDS]
#
# Packages must be installed (pip install -e '.[liger,demo,test]'). Results: $OUT/tests.txt, parts.json, records/*.
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:?a folder for the results}
LIMIT=${1:-440}
SHAPE=${SHAPE:-llama-7b} # tiny: a rehearsal without a GPU
BEGAN=$SECONDS
mkdir -p "$OUT/records"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
nvidia-smi --query-gpu=name,memory.used,clocks.sm,power.draw --format=csv,noheader
left() { echo $((LIMIT - (SECONDS - BEGAN))); }
arms() { # ZERO ARMS MORE...: a record with what fits in the time that is left
    local rest; rest=$(left)
    if [ "$rest" -lt 25 ]; then echo "no time left: $2 (zero $1)"; return; fi
    python3 eval/bench/step.py --shape "$SHAPE" --zero "$1" --arms "$2" --steps 24 --warmup 4 --part-steps 2 \
        --schedule-steps 0 --delta-t 10 --deadline $((rest - 15)) --timeout 100 --out "$OUT/records" "${@:3}" 2>&1 |
        tee -a "$OUT/steps.txt"
}

SALIENT_TEST_GPU=1 timeout 90 python3 -m pytest -q -m gpu -p no:cacheprovider tests/unit/salience/test_sensitivity_gpu.py \
    tests/unit/models/test_packed_gpu.py tests/unit/adapters/test_bank_gpu.py 2>&1 | tail -40 | tee "$OUT/tests.txt"
echo "tests done after $((SECONDS - BEGAN)) s"
timeout 60 python3 eval/bench/parts.py --out "$OUT/parts.json" 2>&1 | grep -v -i warn | tee "$OUT/parts.txt"
echo "parts done after $((SECONDS - BEGAN)) s"
# The yardstick; ours and the methods that were slow (unpacked: as before), with a target below the rank, so that all keep
# their statistics; at rank 480, AdaLoRA's statistics in eight passes or one, events every ten steps, and gradients.
arms plain peft_lora+compile@64,peft_lora+compile+liger@64
arms 2 salientlora+compile@64,lora2+compile@64,heterolora+compile@64,increlora@64,adalora+compile@480,\
adalora+compile@480,salientlora+compile+unfused@480,salientlora+compile@480 --target-rank 16
arms 2 lora2+unpacked@64,heterolora+unpacked@64,adalora+compile@64,salientlora+compile+targets@64,spectral+compile@64 \
    --target-rank 16
echo "window ended after $((SECONDS - BEGAN)) s"
