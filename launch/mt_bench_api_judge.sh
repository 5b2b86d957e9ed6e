#!/usr/bin/env bash
# MT-Bench with a judge behind an API, GPT-4 unless JUDGE_MODEL says otherwise. Never spends more than MAX_COST dollars.
#
#   export OPENAI_API_KEY=...
#   MAX_COST=6 launch/mt_bench_api_judge.sh launch/recipes/llama-7b-alpaca-salientlora.yaml
#
# Prices are dollars per million tokens and change: set PRICE_PROMPT and PRICE_COMPLETION to those of your judge.
# What it would cost, without asking anything: STEPS=judge JUDGE_ARGS=--dry-run MAX_COST=0 launch/mt_bench_api_judge.sh ...
# Everything else: launch/mt_bench.sh.
set -euo pipefail
: "${MAX_COST:?set MAX_COST to the dollars that judging may cost}"
prices="--price-prompt ${PRICE_PROMPT:-30} --price-completion ${PRICE_COMPLETION:-60}"
export QUESTIONS=mt_bench JUDGE_MODEL=${JUDGE_MODEL:-gpt-4}
export JUDGE_ARGS="--max-cost $MAX_COST $prices ${JUDGE_ARGS:-}"
exec "$(dirname "$0")/mt_bench.sh" "$@"
