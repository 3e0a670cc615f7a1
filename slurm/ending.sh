# shellcheck shell=bash
# What comes after a job's step: whether it has ended, is brought back, or is given up. `job.sh`
# sources it, and says what the variables are.

# The newest checkpoint's step; 0 where there is none.
newest_step() {
  local newest=0 path
  for path in "$run_directory"/checkpoints/step-*; do
    [[ ! -d $path ]] || newest=${path##*-}
  done
  echo "$((10#$newest))"
}

# Notes a failure; false where it is the last of as many alike as are allowed.
note_failure() {
  local cause=$1 alike=0 forgiven=0 step text log=$run_directory/failures.tsv
  # What cannot be counted would be brought back for ever.
  [[ -n $run_directory ]] || return 1
  [[ $verb = train ]] || log=$run_directory/failures-$verb.tsv
  printf '%(%FT%T%z)T\t%s\t%s\t%s\n' -1 "$(job_id)" "$(newest_step)" "$cause" >>"$log" || return 0
  # Those before the run was given up and started again by hand do not count.
  [[ $verb != train || ! -r $run_directory/logs/.forgiven ]] || forgiven=$(<"$run_directory/logs/.forgiven")
  # Alike: the same words, whatever the numbers in them, and no checkpoint made between them.
  while IFS=$'\t' read -r _ _ step text; do
    if [[ $step = "$(newest_step)" && ${text//[0-9]/} = "${cause//[0-9]/}" ]]; then
      alike=$((alike + 1))
    else
      alike=0
    fi
  done < <(tail -n "+$((forgiven + 1))" "$log")
  [[ $alike -lt $alike_failures ]]
}

# Tells a sweep, and `modtrain status`, that the run failed and does not come back by itself.
note_end() {
  local text=${1//[[:cntrl:]]/ } file=$run_directory/failure.json
  [[ -n $run_directory && $verb = train ]] || return 0
  text=${text//\\/\\\\}
  { printf '{"kind": "job %s", "text": "%s", "time": "%(%FT%T%z)T", "job": "%s"}\n' \
    "$(job_id)" "${text//\"/\\\"}" -1 "$(job_id)" >"$file.part" && mv "$file.part" "$file"; } || true
}

# Takes that back: somebody has started the run again. A chain's next job was there before, and ends.
forgive() {
  local file=$run_directory/failure.json
  [[ -n $run_directory && $verb = train && -e $file ]] || return 0
  if [[ $again = nothing ]] && was_waiting "$file"; then
    say "the run was given up: $(<"$file")"
    exit 1
  fi
  mkdir -p "$run_directory/logs"
  touch "$run_directory/failures.tsv"
  wc -l <"$run_directory/failures.tsv" >"$run_directory/logs/.forgiven"
  rm -f "$file"
}

# Whether this job was in the queue already when a file was written.
was_waiting() {
  local submitted
  look || return 1
  [[ $shown =~ \ SubmitTime=([0-9T:-]+) ]] || return 1
  submitted=$(date -d "${BASH_REMATCH[1]}" +%s) || return 1
  [[ $submitted -le $(stat -c %Y "$1") ]]
}

# Adds this job to those of the run where `modtrain submit` did not: status and cancel look there.
note_job() {
  local file=$run_directory/jobs.jsonl
  [[ -n $run_directory && $verb = train ]] || return 0
  mkdir -p "$run_directory"
  ! grep -qsF "\"job\": \"$(job_id)\"" "$file" || return 0
  write_job "$file" "$(job_id)" null
}

# write_job FILE JOB BEFORE: a line as `modtrain submit` writes them.
write_job() {
  local text=${script//\\/\\\\}
  printf '{"job": "%s", "time": "%(%FT%T%z)T", "script": "%s", "chained_after": %s}\n' \
    "$2" -1 "${text//\"/\\\"}" "$3" >>"$1"
}

# Ends the job where `modtrain cancel` named it; an array's mark lies a directory higher.
stop_if_cancelled() {
  local folder
  [[ -n $run_directory ]] || return 0
  for folder in "$run_directory" "$run_directory/.."; do
    [[ -r $folder/CANCELLED ]] || continue
    if grep -qxF -e "$(job_id)" -e "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$folder/CANCELLED"; then
      say "cancelled at step $(newest_step); the run can be submitted again"
      exit 75
    fi
  done
}

# Ends the job where somebody else did, by scancel: neither its limit is near, of which USR1 tells, nor
# does another job want its nodes. A job that may not be requeued looks like this when it loses a node.
stop_if_ended() {
  [[ $again = requeue && -n $asked && -z $warned ]] || return 0
  ! is_preempted || return 0
  [[ $shown =~ \ JobState=(COMPLETING|CANCELLED) ]] || return 0
  say "ended by scancel at step $(newest_step); the run can be submitted again"
  exit 75
}

# Ends the job by what became of the step: never with 0 while there is work left.
finish() {
  local told='' cause=''
  if [[ -r $MODTRAIN_OUTCOME ]]; then { read -r told; read -r cause; } <"$MODTRAIN_OUTCOME" || true; fi
  rm -f "$MODTRAIN_OUTCOME" || true
  # torchrun has one exit code for all failures; what modtrain itself said is nearer.
  [[ -z $told || $status -eq 0 ]] || status=$told
  [[ $status -ne 0 || ${told:-0} -ne 0 ]] || exit 0
  [[ $status -ne 0 ]] || status=$told
  stop_if_cancelled
  stop_if_ended
  case $status in
    2)
      note_failure "${cause:=the configuration is wrong}" || true
      note_end "$cause"
      say "not started again: the configuration has to be mended"
      exit 2
      ;;
    130) say "interrupted, and not started again"; exit 130 ;;
    75) go_on "stopped by a signal" ;;
  esac
  # A signal that came before modtrain could listen kills it, and one that comes late breaks it. An
  # exit code does not tell: srun ends the other tasks of one that failed by TERM too.
  [[ -z $asked ]] || go_on "stopped by $asked, without a checkpoint of its own"
  ! is_preempted || go_on "stopped by a preemption, without a checkpoint of its own"
  fail "$status" "${cause:-exit code $status}"
}

# fail STATUS CAUSE: counts a failure, and brings the job back while that may help.
fail() {
  say "failed: $2"
  wait_for_directory
  if note_failure "$2"; then go_on "failed at step $(newest_step)"; fi
  if [[ -n $run_directory ]]; then
    say "failed $alike_failures times in this way without a new checkpoint: $2"
  fi
  note_end "$2"
  say "not started again"
  exit "$1"
}

# Leaves in `shown` what Slurm says of this job; nothing, and false, where it does not say.
look() {
  shown=$(scontrol --oneliner show job "$(job_id)" 2>/dev/null)
}

# Whether Slurm takes the nodes away; the signal of that comes to the tasks alone. Slurm may remember
# an earlier start's preemption.
is_preempted() {
  local began
  look || return 1
  [[ $shown =~ \ StartTime=([0-9T:-]+) ]] || return 1
  began=${BASH_REMATCH[1]}
  [[ $shown =~ \ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $began ]]
}

# A job whose log cannot be opened at its next start is lost, for Slurm does not bring that one back;
# and a failure has to be noted to be counted.
wait_for_directory() {
  local try mark=$run_directory/logs/.writable-$SLURM_JOB_ID
  [[ -n $run_directory ]] || return 0
  for ((try = 0; try < 60; try++)); do
    if { echo there >"$mark"; } 2>/dev/null; then
      rm -f "$mark" || true
      return 0
    fi
    [[ $try -ne 0 ]] || say "nothing can be written to $run_directory: waits up to 10 minutes for it"
    sleep 10
  done
}

# Brings the job back, and ends it.
go_on() {
  local try said
  trap '' USR1 TERM
  wait_for_directory
  stop_if_cancelled
  case $again in
    requeue)
      say "$1: requeued"
      # The controller may be away for a while.
      for try in 1 2 3 4 5 6 7 8 9 10; do
        if said=$(scontrol requeue "$(job_id)" 2>&1); then
          # The job is taken away from under this script.
          sleep 60
          exit 75
        fi
        say "requeueing failed ($try of 10): $said"
        [[ $said != *disabled* && $said != *denied* ]] || break
        sleep 15
      done
      say "it cannot be requeued: submitted again"
      resubmit || say "that failed too: submit it by hand"
      ;;
    resubmit)
      say "$1: submitted again"
      resubmit || say "that failed: submit it by hand"
      ;;
    nothing) say "$1: the next job of the chain, or the same command, goes on" ;;
  esac
  exit 75
}

# run_of OVERRIDE...: the directory of the run that they name, as modtrain understands it.
run_of() {
  local word name='' runs=runs
  for word in "$@"; do
    case $word in
      name=*) name=$(unquoted "${word#name=}") ;;
      runs_dir=*) runs=$(unquoted "${word#runs_dir=}") ;;
    esac
  done
  [[ -z $name ]] || echo "$runs/$name"
}

unquoted() {
  local text=$1
  [[ ! $text =~ ^\'(.*)\'$ && ! $text =~ ^\"(.*)\"$ ]] || text=${BASH_REMATCH[1]}
  echo "$text"
}

resubmit() {
  local next foreign task=${SLURM_ARRAY_TASK_ID:-} own=() folder
  # A task of an array goes on alone.
  [[ -z $task ]] || own=(--array="$task")
  # What the script says of itself holds, whatever the environment was told.
  unset SBATCH_TIMELIMIT SBATCH_REQUEUE SBATCH_NO_REQUEUE SBATCH_ARRAY_INX SBATCH_SIGNAL
  own+=(--dependency="afterany:$(job_id)")
  # Nor is what Slurm said of this job true of that one.
  mapfile -t foreign < <(compgen -v | grep -E '^(SLURM|_SLURM_SPANK)_' | grep -vxE 'SLURM_(CONF|CLUSTERS|JWT)')
  next=$(unset "${foreign[@]}" && sbatch --parsable "${own[@]}" "$script" "${arguments[@]}") || return
  next=${next%%;*}${task:+_$task}
  say "job $next goes on"
  [[ -n $run_directory ]] || return 0
  # Those who end an array look above its runs.
  for folder in "$run_directory" ${task:+"$run_directory/.."}; do
    write_job "$folder/jobs.jsonl" "$next" "\"$(job_id)\""
  done
}
