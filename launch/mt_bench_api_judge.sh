#!/usr/bin/env bash
# MT-Bench with a judge behind an API. The judge is GPT-4 unless JUDGE_MODEL names another.
# Judging the same answers never costs more than MAX_COST dollars, however often this script is started: an attempt
# whose bill is unknown counts at the most it can cost. (eval/mt_bench/README.md, "Money".)
#
#   export OPENAI_API_KEY=...
#   MAX_COST=6 launch/mt_bench_api_judge.sh launch/recipes/llama-7b-alpaca-salientlora.yaml
#
# Prices are in dollars per million tokens, and they change. Set PRICE_PROMPT and PRICE_COMPLETION to your judge's.
# To see the cost without asking the judge:
#   STEPS=judge JUDGE_ARGS=--dry-run MAX_COST=0 launch/mt_bench_api_judge.sh ...
# launch/mt_bench.sh documents all other settings.
set -euo pipefail
: "${MAX_COST:?set MAX_COST to the dollars that judging may cost}"
prices="--price-prompt ${PRICE_PROMPT:-30} --price-completion ${PRICE_COMPLETION:-60}"
export QUESTIONS=${QUESTIONS:-mt_bench} JUDGE_MODEL=${JUDGE_MODEL:-gpt-4}
export JUDGE_ARGS="--max-cost $MAX_COST $prices ${JUDGE_ARGS:-}"
exec "$(dirname "$0")/mt_bench.sh" "$@"
