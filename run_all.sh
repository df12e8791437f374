#!/usr/bin/env bash
# Every run behind the paper's Tables 1, 2 and 3 and Figure 2, then the tables:
#
#   bash run_all.sh                                # the whole grid, one run after the other
#   bash run_all.sh table1                         # one table's runs, or those of several
#   bash run_all.sh --toy                          # a small grid of toy runs, offline, in minutes
#   bash run_all.sh --list table3                  # print one command a line and run nothing
#   STEPS=2400 SEEDS="0 1 2" BACKBONE=DIR DATA=DIR bash run_all.sh table1 --lr 5e-4 --prompt-lr 5e-2
#
# The same command again skips what is finished and goes on with what was interrupted.  A failed run
# does not stop the others; the exit code tells.  A wrong flag stops all, before the first begins.
# From the environment come SEEDS, STEPS, BACKBONE, DATA, OUT and JOBS (how many runs at a time);
# other flags are passed on to every run.
#
#   table1   3 sources x 4 methods x 10 seeds = 120 runs.  By the paper's half an hour for 24,000
#            steps on an A100: 60 hours.
#   table2   SIB-200's zero-shot baseline, the whole encoder fine-tuned on English, Arabic or
#            Chinese, x 6 seeds = 18 runs.  The table's other rows are published, or in table1.
#   table3   46 targets x 6 seeds = 276 runs of 6,000 steps that go on from DUAL-70 of Joshi5, 35
#            hours; and as many of fine-tuning the whole encoder on the target, which nobody timed.
#
# A run of table3 trains its source run first if need be, and waits where another run is just
# training it; with table1 done before, none has to.  Fine-tuning keeps its rate of 1e-5 whatever
# --lr says, fp32 whatever --dtype says, and no prompt; so with a small STEPS its rows mean little.
# A run with XLM-R large leaves 14 to 19 MB (7 GB in all); fine-tuning writes 4.5 GB an epoch, and
# needs 9 GB until it is done.
#
# On SLURM, one array a table, a run per task, submitted from this folder with Python's environment
# active and what is to be set (SEEDS, OUT, ...) exported:
#
#   size() { bash run_all.sh --list "$1" | wc -l; }
#   first=$(sbatch --parsable --gres=gpu:1 --array=1-$(size table1) run_all.sh table1)
#   sbatch --gres=gpu:1 --array=1-$(size table2) run_all.sh table2
#   sbatch --gres=gpu:1 --array=1-$(size table3) --dependency=afterok:$first \
#          --kill-on-invalid-dep=yes run_all.sh table3
#   python groups.py runs                          # afterwards: print the tables
#
# Where one run of table1 fails, or is stopped, table3 is cancelled as a whole: submit both again,
# and what is finished costs seconds.  A task that its time limit or scancel stopped goes on where
# its last epoch ended when it is submitted again, one that was requeued by itself.  What a task
# printed is in slurm-*.out, from a requeue on only with --open-mode=append.
set -euo pipefail

say() { echo "run_all.sh: $*" >&2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" > /dev/null && pwd)
[[ -e $here/xpe.py ]] || here=${SLURM_SUBMIT_DIR:-$here}  # SLURM runs a copy that lies elsewhere
[[ -e $here/xpe.py ]] || { say "no xpe.py in $here; submit from the folder that holds it"; exit 2; }

# ------------------------------------------------------------------------------- Flags and settings
list="" toy="" tables=() flags=()
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --list) list=1 ;;
    table[123]) tables+=("$word") ;;
    --out* | --steps* | --seed* | --method* | --xpe-ratio* | --source* | --target*)
      say "not $word, the grid sets it; say OUT=DIR STEPS=462 SEEDS='0 1' bash run_all.sh"
      exit 2 ;;
    --toy) toy=1 flags+=(--toy) ;;
    -*) flags+=("$word") ;;
    *)                                                    # the value of the flag before it
      [[ ${#flags[@]} -gt 0 ]] || { say "not $word: table1, table2 or table3, or flags"; exit 2; }
      flags+=("$word") ;;
  esac
done
[[ ${#tables[@]} -gt 0 ]] || tables=(table1 table2 table3)

if [[ $toy ]]; then
  seeds=(${SEEDS:-0 1}) steps=${STEPS:-300} jobs=${JOBS:-2}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}            # in models so small, threads gain nothing
else
  seeds=(${SEEDS:-0 1 2 3 4 5 6 7 8 9}) steps=${STEPS:-24000} jobs=${JOBS:-1}
fi
steps=${steps//_/}
for setting in "STEPS=$steps" "JOBS=$jobs" "${seeds[@]/#/SEEDS=}" ${SLURM_ARRAY_TASK_ID:+"task=$SLURM_ARRAY_TASK_ID"}; do
  [[ ${setting#*=} =~ ^(0|[1-9][0-9]*)$ ]] || { say "$setting is not a whole number"; exit 2; }
done
((jobs > 0 && steps >= 4)) || { say "JOBS=$jobs, STEPS=$steps: one at least, and four"; exit 2; }
few=$((steps / 4))                                        # for a target, and for fine-tuning

# --------------------------------------------------------------------------------------- The grid
# Prints a run's name, a tab, and its command, whose last flags count most.
run() {
  printf '%s-s%s\t' "$1" "$seed"
  printf '%q ' python "$here/xpe.py" --out "${OUT:-runs}" --steps "$steps" \
    ${BACKBONE:+--backbone "$BACKBONE"} ${DATA:+--data "$DATA"} ${flags[@]+"${flags[@]}"} "${@:2}"
  echo "--seed $seed"
}

# AUTHORS: SIB-200's own baseline has AdamW, a linear decay and 440 steps; this one has our loop.
full() {                                                  # the whole encoder on the language $1
  local rate=(--lr 1e-5)
  [[ ! $toy ]] || rate=()                                 # its random encoder has further to go
  run "full-$1" --method full --source "$1" --steps $few \
    ${rate[@]+"${rate[@]}"} --dtype fp32 --prompt-length 0 "${@:2}"
}

table1() {                                                # and Figure 2
  for source in joshi5 enarzho seen; do
    for seed in "${seeds[@]}"; do
      run spt-$source --method spt --source $source
      run dual30-$source --method dual --xpe-ratio 0.3 --source $source
      run dual70-$source --method dual --xpe-ratio 0.7 --source $source
      run xpe-$source --method xpe --source $source
    done
  done
}

table2() {
  for seed in "${seeds[@]:0:6}"; do
    for source in eng_Latn arb_Arab zho_Hans; do
      full $source
    done
  done
}

table3() {
  local targets="swh_Latn lao_Laoo tir_Ethi kab_Latn"
  [[ $toy ]] || targets=$(cd "$here" > /dev/null &&
    python -c "import groups; print(*groups.FULL_SUPERVISION_TARGETS)")
  for seed in "${seeds[@]:0:6}"; do
    for target in $targets; do
      run dual70-joshi5-$target --method dual --xpe-ratio 0.7 --source joshi5 \
        --target $target --target-steps $few
      full $target --languages $target
    done
  done
}

grid() { for table in "${tables[@]}"; do "$table"; done; }

# ------------------------------------------------------------------------ List it, or run one of it
if [[ $list ]]; then
  grid | cut -f 2
  exit
fi
if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
  line=$(grid | sed -n "$((SLURM_ARRAY_TASK_ID))p;" 2> /dev/null || true)
  [[ $line ]] || { say "no run $SLURM_ARRAY_TASK_ID: there are $(grid | wc -l) lines"; exit 2; }
  command=${line#*$'\t'}
  echo "$command"
  eval "exec $command"                                    # SLURM's signals reach the run itself
fi

# --------------------------------------------------------------------------------------- Run it all
# From the lines of the grid those that are not finished, numbered, with a NUL after each.  torch
# is loaded once for all of them.  What xpe.py refuses in one of them ends all, before the first run
# begins; whatever else goes wrong here, the run itself will say.
unfinished='
import shlex, sys
sys.path.insert(0, sys.argv[1])
import groups
try:
    import functools, xpe
    xpe.read_rows = functools.cache(xpe.read_rows)        # each file once, not once a run
except Exception:
    xpe = None

def scan():
    lines = sys.stdin.read().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line.split("\t")[1])
            finished = xpe.finished(xpe.parse(words[2:]))
        except groups.InputError:
            raise
        except (Exception, SystemExit):
            finished = False
        if not finished:
            print(f"{number}/{len(lines)} {line}", end="\0")

sys.exit(groups.guarded("run_all.sh", scan))'

one() {                                                   # "12/46 name", a tab, a command
  local label=${1%%$'\t'*} command=${1#*$'\t'} code=0
  echo "$label"
  { eval "$command" 2>&1 > /dev/null || exit $?; } |      # each line of its errors with its label
    while IFS= read -r line; do echo "$label: $line" >&2; done || code=$?
  case $code in
    0) echo "$label: done" ;;
    129 | 130 | 137 | 143) echo "$label: stopped" >&2; return 1 ;;
    *) echo "$label: FAILED: $command" >&2; return 1 ;;
  esac
}
export -f one

all() {
  local failed=0 code=0 todo
  todo=$(mktemp)                                          # no pipe: torch would wait at its other end
  grid | python -c "$unfinished" "$here" > "$todo" || code=$?
  {
    rm "$todo"
    ((code == 0)) || return $code
    xargs -0 -r -n 1 -P "$jobs" bash -o pipefail -c 'one "$0"' || failed=1
  } < "$todo"
  python "$here/groups.py" "${OUT:-runs}" || failed=1
  return $failed
}

stop() {                                                  # $1: the signal's number
  trap - INT TERM HUP
  kill -TERM -- "-$group"
  for _ in {1..50}; do                                    # until all have ended
    kill -0 -- "-$group" && sleep 0.1 || break
  done
  echo "run_all.sh: stopped; the same command goes on" >&3
  exit $((128 + $1))
} 3>&2 2> /dev/null

set -m                                                    # a process group of its own, to be ended
all &
group=$!
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM
wait "$group"
