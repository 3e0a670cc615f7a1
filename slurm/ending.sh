# shellcheck shell=bash
# What follows a job's step: the job ends, is restarted, or has failed for good. `job.sh` sources
# this file and lists the variables.

# The newest checkpoint's step; 0 without one.
newest_step() {
  local newest=0 path
  for path in "$run_directory"/checkpoints/step-*; do
    [[ ! -d $path ]] || newest=${path##*-}
  done
  echo "$((10#$newest))"
}

# Records a failure; false if it is the last of the allowed number of equal ones.
record_failure() {
  local cause=$1 num_equal=0 num_cleared=0 step text log=$run_directory/failures.tsv
  # Failures that cannot be counted would restart the job for ever.
  [[ -n $run_directory ]] || return 1
  [[ $verb = train ]] || log=$run_directory/failures-$verb.tsv
  printf '%(%FT%T%z)T\t%s\t%s\t%s\n' -1 "$(job_id)" "$(newest_step)" "$cause" >>"$log" || return 0
  # Failures before a restart by hand do not count.
  [[ $verb != train || ! -r $run_directory/logs/.forgiven ]] || num_cleared=$(<"$run_directory/logs/.forgiven")
  # Equal: the same text up to numbers, and no new checkpoint between them.
  while IFS=$'\t' read -r _ _ step text; do
    if [[ $step = "$(newest_step)" && ${text//[0-9]/} = "${cause//[0-9]/}" ]]; then
      num_equal=$((num_equal + 1))
    else
      num_equal=0
    fi
  done < <(tail -n "+$((num_cleared + 1))" "$log")
  [[ $num_equal -lt $max_equal_failures ]]
}

# Records, for a sweep and `modtrain status`, that the run failed and is not restarted.
write_final_failure() {
  local text=${1//[[:cntrl:]]/ } file=$run_directory/failure.json
  [[ -n $run_directory && $verb = train ]] || return 0
  text=${text//\\/\\\\}
  { printf '{"kind": "job %s", "text": "%s", "time": "%(%FT%T%z)T", "job": "%s"}\n' \
    "$(job_id)" "${text//\"/\\\"}" -1 "$(job_id)" >"$file.part" && mv "$file.part" "$file"; } || true
}

# Clears that record when the run is started again. A chain's next job was queued before, and ends.
clear_failure() {
  local file=$run_directory/failure.json
  [[ -n $run_directory && $verb = train && -e $file ]] || return 0
  if [[ $again = nothing ]] && was_queued_before "$file"; then
    say "the run has failed for good: $(<"$file")"
    exit 1
  fi
  mkdir -p "$run_directory/logs"
  touch "$run_directory/failures.tsv"
  wc -l <"$run_directory/failures.tsv" >"$run_directory/logs/.forgiven"
  rm -f "$file"
}

# Whether this job was in the queue before a file was written.
was_queued_before() {
  local submitted
  read_job_state || return 1
  [[ $job_state =~ \ SubmitTime=([0-9T:-]+) ]] || return 1
  submitted=$(date -d "${BASH_REMATCH[1]}" +%s) || return 1
  [[ $submitted -le $(stat -c %Y "$1") ]]
}

# Adds this job to the run's jobs.jsonl, if `modtrain submit` did not, for status and cancel.
record_job() {
  local file=$run_directory/jobs.jsonl
  [[ -n $run_directory && $verb = train ]] || return 0
  mkdir -p "$run_directory"
  ! grep -qsF "\"job\": \"$(job_id)\"" "$file" || return 0
  write_job "$file" "$(job_id)" null
}

# write_job FILE JOB PREVIOUS: appends a line in the format of `modtrain submit`.
write_job() {
  local text=${script//\\/\\\\}
  printf '{"job": "%s", "time": "%(%FT%T%z)T", "script": "%s", "chained_after": %s}\n' \
    "$2" -1 "${text//\"/\\\"}" "$3" >>"$1"
}

# Ends the job if `modtrain cancel` has listed it; for an array that file is one directory higher.
exit_if_cancelled() {
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

# Ends the job after a scancel: no USR1 has announced the time limit, and the job is not preempted. A
# job that must not be requeued is in the same state when it loses a node.
exit_if_scancelled() {
  [[ $again = requeue && -n $received_signal && -z $got_usr1 ]] || return 0
  ! is_preempted || return 0
  [[ $job_state =~ \ JobState=(COMPLETING|CANCELLED) ]] || return 0
  say "ended by scancel at step $(newest_step); the run can be submitted again"
  exit 75
}

# Ends the job according to the step's outcome: never with 0 while there is work left.
finish() {
  local outcome='' cause=''
  if [[ -r $MODTRAIN_OUTCOME ]]; then { read -r outcome; read -r cause; } <"$MODTRAIN_OUTCOME" || true; fi
  rm -f "$MODTRAIN_OUTCOME" || true
  # torchrun has one exit code for all failures; prefer the code that modtrain has written.
  [[ -z $outcome || $status -eq 0 ]] || status=$outcome
  [[ $status -ne 0 || ${outcome:-0} -ne 0 ]] || exit 0
  [[ $status -ne 0 ]] || status=$outcome
  exit_if_cancelled
  exit_if_scancelled
  case $status in
    2)
      record_failure "${cause:=the configuration is wrong}" || true
      write_final_failure "$cause"
      say "not restarted: correct the configuration"
      exit 2
      ;;
    130) say "interrupted, not restarted"; exit 130 ;;
    75) restart_job "stopped by a signal" ;;
  esac
  # A signal before modtrain has its handlers kills it, and a late one interrupts its exit. The exit
  # code does not show this: srun also ends the other tasks of a failed one by TERM.
  [[ -z $received_signal ]] || restart_job "stopped by $received_signal, without a checkpoint of its own"
  ! is_preempted || restart_job "stopped by a preemption, without a checkpoint of its own"
  fail "$status" "${cause:-exit code $status}"
}

# fail STATUS CAUSE: records a failure, and restarts the job while that may help.
fail() {
  say "failed: $2"
  wait_for_directory
  if record_failure "$2"; then restart_job "failed at step $(newest_step)"; fi
  if [[ -n $run_directory ]]; then
    say "failed $max_equal_failures times in this way without a new checkpoint: $2"
  fi
  write_final_failure "$2"
  say "not restarted"
  exit "$1"
}

# Sets `job_state` to Slurm's description of this job; false without an answer.
read_job_state() {
  job_state=$(scontrol --oneliner show job "$(job_id)" 2>/dev/null)
}

# Whether the job is being preempted; only the tasks receive that signal. Slurm may still report the
# preemption of an earlier start.
is_preempted() {
  local began
  read_job_state || return 1
  [[ $job_state =~ \ StartTime=([0-9T:-]+) ]] || return 1
  began=${BASH_REMATCH[1]}
  [[ $job_state =~ \ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $began ]]
}

# A job whose log cannot be opened at its next start is lost: Slurm does not requeue it. And a failure
# must be recorded to be counted.
wait_for_directory() {
  local try mark=$run_directory/logs/.writable-$SLURM_JOB_ID
  [[ -n $run_directory ]] || return 0
  for ((try = 0; try < 60; try++)); do
    if { echo test >"$mark"; } 2>/dev/null; then
      rm -f "$mark" || true
      return 0
    fi
    [[ $try -ne 0 ]] || say "cannot write to $run_directory: waiting for it up to 10 minutes"
    sleep 10
  done
}

# restart_job REASON: requeues or resubmits the job as configured, and ends it.
restart_job() {
  local try output
  trap '' USR1 TERM
  wait_for_directory
  exit_if_cancelled
  case $again in
    requeue)
      say "$1: requeued"
      # The controller may be unreachable for a while.
      for try in 1 2 3 4 5 6 7 8 9 10; do
        if output=$(scontrol requeue "$(job_id)" 2>&1); then
          # Slurm ends this script meanwhile.
          sleep 60
          exit 75
        fi
        say "requeueing failed ($try of 10): $output"
        [[ $output != *disabled* && $output != *denied* ]] || break
        sleep 15
      done
      say "it cannot be requeued: resubmitting"
      resubmit || say "resubmitting failed too: submit it by hand"
      ;;
    resubmit)
      say "$1: resubmitting"
      resubmit || say "resubmitting failed: submit it by hand"
      ;;
    nothing) say "$1: the next job of the chain, or the same command, resumes" ;;
  esac
  exit 75
}

# run_of OVERRIDE...: the directory of the run that they name.
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
  # Only this task of an array is resubmitted.
  [[ -z $task ]] || own=(--array="$task")
  # The script's directives must not be overridden by the environment.
  unset SBATCH_TIMELIMIT SBATCH_REQUEUE SBATCH_NO_REQUEUE SBATCH_ARRAY_INX SBATCH_SIGNAL
  own+=(--dependency="afterany:$(job_id)")
  # Variables that describe this job must not reach the new one.
  mapfile -t foreign < <(compgen -v | grep -E '^(SLURM|_SLURM_SPANK)_' | grep -vxE 'SLURM_(CONF|CLUSTERS|JWT)')
  next=$(unset "${foreign[@]}" && sbatch --parsable "${own[@]}" "$script" "${arguments[@]}") || return
  next=${next%%;*}${task:+_$task}
  say "job $next resumes the run"
  [[ -n $run_directory ]] || return 0
  # `modtrain cancel` of an array reads the directory above its runs.
  for folder in "$run_directory" ${task:+"$run_directory/.."}; do
    write_job "$folder/jobs.jsonl" "$next" "\"$(job_id)\""
  done
}
