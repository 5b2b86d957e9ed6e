#!/usr/bin/env bash
# From a run file to an MT-Bench report: train -> export -> generate -> judge -> report.
#
#   launch/mt_bench.sh RUN.yaml [key=value]...        (key=value: overrides of the run file)
#
# Run the same command again after an interruption: finished steps are skipped, and an interrupted step continues.
# Environment variables:
#   STEPS          steps to run (default "train export generate judge report")
#   PROCESSES      processes for training and generating, one per GPU (default 1)
#   FORM           peft (default), padded or merged: the exported form, which is also the model that answers
#   BASE_TOO       1: the base model answers too, under the name "base", and the report compares both
#   QUESTIONS      mt_bench (default), own (our 16 questions; not MT-Bench), or the path of a question set of your own
#   BENCH_NAME     name of a question set of your own (default: its folder's name)
#   MODEL_ID       name of the answers (default: name of the run directory)
#   DATA, REPORT   folders (default data, report)
#   JUDGE_MODEL    the judge's name at its endpoint; if it is not set, nothing is judged
#   JUDGE_URL      OpenAI-compatible endpoint (default https://api.openai.com/v1, key in OPENAI_API_KEY)
#   GENERATE_ARGS, JUDGE_ARGS, REPORT_ARGS    further options of `salient-ds mt-bench generate`, `judge`, `report`
# Ready-made variants: mt_bench_api_judge.sh, mt_bench_local_judge.sh, mt_bench_own_set.sh.
set -euo pipefail
{ # bash reads this whole block before it runs anything, so editing the file during a run of hours does no harm

if (($# == 0)); then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
run_file=$1
overrides=("${@:2}")
steps=" ${STEPS:-train export generate judge report} "
for step in $steps; do
  [[ " train export generate judge report " == *" $step "* ]] || {
    echo "error: STEPS names '$step', which is none of train, export, generate, judge, report" >&2
    exit 2
  }
done
processes=${PROCESSES:-1} form=${FORM:-peft} data=${DATA:-data}
questions=(--questions "${QUESTIONS:-mt_bench}")
[[ -z ${BENCH_NAME:-} ]] || questions+=(--bench-name "$BENCH_NAME")
read -r -a generate_args <<<"${GENERATE_ARGS:-}"
read -r -a judge_args <<<"${JUDGE_ARGS:-}"
read -r -a report_args <<<"${REPORT_ARGS:-}"
if [[ ${BASE_TOO:-0} == 1 && " ${generate_args[*]-} " == *" --endpoint "* ]]; then
  echo "error: BASE_TOO=1 with --endpoint would ask the same served model twice: generate the base's answers apart" >&2
  exit 2
fi
# One fact per line. The package itself reads the run file, so that overrides count. The last line names the sections
# that differ from an earlier run in the same output_dir.
mapfile -t facts < <(python - "$run_file" "${overrides[@]}" <<'PYTHON'
import sys
from pathlib import Path
import yaml
from salient_ds.config.run import ConfigError, load_config, parse_config
try:
    config = load_config(sys.argv[1], sys.argv[2:])
    there = Path(config.output_dir, "run.yaml")
    earlier = parse_config(yaml.safe_load(there.read_text())) if there.is_file() else config
except ConfigError as error:
    sys.exit(f"error: {error}")
now, before = config.model_dump(), earlier.model_dump()
changed = ", ".join(key for key in now if now[key] != before[key])
print(config.output_dir, config.model.path, config.data.template, changed, sep="\n")
PYTHON
)
((${#facts[@]} == 4)) || exit 2
run_dir=${facts[0]} base=${facts[1]} template=${facts[2]} changed=${facts[3]}
model_id=${MODEL_ID:-$(basename "$run_dir")}

wanted() { [[ $steps == *" $1 "* ]]; }
say() { printf '\n== %s\n' "$*"; }

# Training already writes the peft form to RUN/adapter.
exported=$run_dir/adapter
[[ $form == peft ]] || exported=$run_dir/export-$form
mark=salient_ds.json # every exported form contains it

answer() { # MODEL NAME [option]...
  local command=(mt-bench generate "$1" --model-id "$2" --data "$data" "${questions[@]}" "${generate_args[@]}" "${@:3}")
  if ((processes > 1)); then
    deepspeed --num_accelerators "$processes" --no_local_rank --module salient_ds.cli "${command[@]}"
  else
    salient-ds "${command[@]}"
  fi
}

if wanted train; then
  if [[ -f $run_dir/adapter/$mark ]]; then
    [[ -z $changed ]] || {
      echo "error: $run_dir was trained with another $changed: give another output_dir, or leave train out of STEPS" >&2
      exit 2
    }
    say "train: $run_dir is finished"
  else
    say "train: $run_file"
    # with --gpus this command becomes the launcher, so it ends with the exit status of the training
    salient-ds train "$run_file" "${overrides[@]}" --gpus "$processes" --resume auto
  fi
fi
if wanted export; then
  if [[ -f $exported/$mark && ! $run_dir/adapter/$mark -nt $exported/$mark ]]; then
    say "export: $exported is there"
  else
    say "export: $form"
    salient-ds export "$run_dir" --form "$form" --output "$exported" --overwrite
  fi
fi
if wanted generate; then
  say "generate: $model_id"
  answer "$exported" "$model_id"
  [[ ${BASE_TOO:-0} != 1 ]] || answer "$base" base --template "$template"
fi
if [[ -z ${JUDGE_MODEL:-} ]]; then
  if wanted judge || wanted report; then
    say "not judged: set JUDGE_MODEL (and JUDGE_URL for a server of your own), then start this again"
  fi
  exit 0
fi
if wanted judge; then
  say "judge: $JUDGE_MODEL"
  salient-ds mt-bench judge --data "$data" "${questions[@]}" --judge-model "$JUDGE_MODEL" \
    --base-url "${JUDGE_URL:-https://api.openai.com/v1}" "${judge_args[@]}"
fi
if wanted report; then
  say "report"
  salient-ds mt-bench report --data "$data" "${questions[@]}" --judge-model "$JUDGE_MODEL" \
    --out "${REPORT:-report}" "${report_args[@]}"
fi
exit
}
