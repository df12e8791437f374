#!/usr/bin/env bash
# Every run behind Tables 1, 2 and 3 and Figure 2, then the tables:
#
#   bash run_all.sh                                     # the paper's grid, one run after the other
#   bash run_all.sh --toy                               # a small grid of toy runs, offline, in minutes
#   STEPS=462 SEEDS="0 1 2" BACKBONE=DIR DATA=DIR bash run_all.sh --lr 5e-4 --prompt-lr 5e-2
#   bash run_all.sh --list                              # print one command a line and run nothing
#   bash run_all.sh --list | head -n 120 | parallel -j 8
#   first=$(sbatch --parsable --gpus=1 --array=1-120 run_all.sh)         # SLURM: a line of the list per task;
#   sbatch --gpus=1 --array=121-690 --dependency=afterok:$first run_all.sh        # these need the first 120
#
# The same command again skips what is finished and goes on with what was interrupted.  A failed run does not
# stop the others; the exit code tells.  From the environment come SEEDS, STEPS, BACKBONE, DATA, OUT and JOBS
# (how many runs at a time); other flags are passed on to every run.
#
# The whole grid has 690 runs.  By the paper's half an hour for 24,000 steps on an A100, Table 1's 120 take 60
# hours and Table 3's 276, of 6,000 steps each, 35; the 294 of fine-tuning the whole backbone were not timed.
# A run with XLM-R large leaves 13 to 18 MB (7 GB in all); fine-tuning needs 9 GB until it is finished.
# Fine-tuning keeps its rate of 1e-5 whatever --lr says, so with a small STEPS its rows mean little.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" > /dev/null && pwd)
[[ -e $here/xpe.py ]] || here=${SLURM_SUBMIT_DIR:?}      # SLURM runs a copy of this file from elsewhere
list="" toy="" flags=()
for flag in "$@"; do
  case $flag in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --list) list=1 ;;
    --out* | --steps* | --seed* | --method* | --xpe-ratio* | --source* | --target*)
      echo "run_all.sh: not $flag, the grid sets it; say OUT=DIR STEPS=462 SEEDS='0 1' bash run_all.sh" >&2
      exit 2 ;;
    --toy) toy=1 flags+=(--toy) ;;
    *) flags+=("$flag") ;;
  esac
done
seeds=(${SEEDS:-${toy:+0 1}})                            # words: unquoted by intention
if [[ ${#seeds[@]} == 0 ]]; then seeds=(0 1 2 3 4 5 6 7 8 9); fi
steps=${STEPS:-${toy:+300}} steps=${steps:-24000} steps=${steps//_/}
[[ $steps =~ ^[0-9]+$ ]] || { echo "run_all.sh: STEPS=$steps is not a number" >&2; exit 2; }
jobs=${JOBS:-${toy:+2}} jobs=${jobs:-1}
targets=$(cd "$here" > /dev/null && python -c "import groups; print(*groups.FULL_SUPERVISION_TARGETS)")
few=$((steps / 4)) full=(--method full --steps $((steps / 4)))
if [[ $toy ]]; then
  targets="swh_Latn lao_Laoo tir_Ethi kab_Latn"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}           # two runs at a time, in which threads gain nothing
else
  full+=(--lr 1e-5)                                      # the toy's random encoder has further to go
fi

run() {                                                  # print one command; what is given last counts
  printf '%q ' python "$here/xpe.py" --out "${OUT:-runs}" --steps "$steps" \
    ${BACKBONE:+--backbone "$BACKBONE"} ${DATA:+--data "$DATA"} ${flags[@]+"${flags[@]}"} "$@"
  echo
}

table1() {
  for source in joshi5 enarzho seen; do                  # Table 1 and Figure 2
    for seed in "${seeds[@]}"; do
      run --method spt --source $source --seed $seed
      run --method dual --xpe-ratio 0.3 --source $source --seed $seed
      run --method dual --xpe-ratio 0.7 --source $source --seed $seed
      run --method xpe --source $source --seed $seed
    done
  done
}

others() {                                               # they go on from runs of Table 1
  for seed in "${seeds[@]:0:6}"; do
    for target in $targets; do                           # Table 3: 46 targets, 6 seeds
      run --method dual --xpe-ratio 0.7 --source joshi5 --target $target --target-steps $few --seed $seed
      run "${full[@]}" --source $target --languages $target --seed $seed
    done
    for source in eng_Latn arb_Arab zho_Hans; do         # Table 2: SIB-200's zero-shot baseline
      run "${full[@]}" --source $source --seed $seed
    done
  done
}

grid() { table1; others; }
if [[ $list ]]; then
  grid
elif [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
  line=$(grid | sed -n "${SLURM_ARRAY_TASK_ID}p")
  eval "${line:?the grid has only $(grid | wc -l) lines}"
else
  failed=0
  for part in table1 others; do
    $part | tr '\n' '\0' | xargs -0 -n 1 -P "$jobs" bash -c \
      'echo "$0"; eval "$0" > /dev/null || { echo "FAILED: $0" >&2; exit 1; }' || failed=1
  done
  python "$here/groups.py" "${OUT:-runs}" || failed=1
  exit $failed
fi
