#!/usr/bin/env bash
# The whole pipeline on the demo's model and our own 16 questions (not MT-Bench). Base model and adapter are compared.
#
#   make demo                           (downloads the model and trains the adapter)
#   launch/mt_bench_own_set.sh          (generates answers; judges them if JUDGE_MODEL is set, see launch/mt_bench.sh)
#
# With another run file: launch/mt_bench_own_set.sh RUN.yaml [key=value]...
set -euo pipefail
here=$(dirname "$0")
(($# > 0)) || set -- "$here/recipes/demo_smollm2.yaml"
export QUESTIONS=own BASE_TOO=1 MODEL_ID=${MODEL_ID:-adapter}
export DATA=${DATA:-.demo/mt_bench} REPORT=${REPORT:-.demo/mt_bench/report}
export GENERATE_ARGS=${GENERATE_ARGS:---max-new-tokens 64}
export JUDGE_ARGS="--judge-truncated ${JUDGE_ARGS:-}"
exec "$here/mt_bench.sh" "$@"
