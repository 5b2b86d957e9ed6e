#!/usr/bin/env bash
# MT-Bench with a judge on this machine or in the local network: any OpenAI-compatible server (vLLM, FastChat, ...).
#
#   python launch/fastchat_server.py /models/my-judge --name my-judge        (in another terminal)
#   JUDGE_MODEL=my-judge launch/mt_bench_local_judge.sh launch/recipes/llama-7b-alpaca-salientlora.yaml
#
# Scores from different judges are not comparable: use one judge for all models that you compare.
# launch/mt_bench.sh documents all other settings.
set -euo pipefail
: "${JUDGE_MODEL:?set JUDGE_MODEL to the name of the model at the server}"
export JUDGE_MODEL JUDGE_URL=${JUDGE_URL:-http://127.0.0.1:8000/v1}
curl --silent --fail --max-time 10 "$JUDGE_URL/models" >/dev/null || {
  echo "error: no server answers at $JUDGE_URL: start one, or set JUDGE_URL" >&2
  exit 2
}
exec "$(dirname "$0")/mt_bench.sh" "$@"
