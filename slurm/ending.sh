# shellcheck shell=bash
# What follows a job's step: the job ends, is restarted, or has failed for good. `job.sh` sources
# this file and lists the variables.

# The newest checkpoint's step; 0 without one. A copy under another name, as step-best, is none.
newest_step() {
  local newest=0 path
  for path in "$run_directory"/checkpoints/step-*; do
    [[ ! -d $path || ! ${path##*/} =~ ^step-[0-9]+$ ]] || newest=${path##*-}
  done
  echo "$((10#$newest))"
}

# record_failure CAUSE [NODES]: records a failure, and the nodes that it is of, if it is of some; sets
# `num_equal` to the failures of this kind in a row. False if this is the last one allowed.
record_failure() {
  local cause=$1 num_cleared=0 log=$run_directory/failures.tsv
  num_equal=0
  # Failures that cannot be counted would restart the job for ever.
  [[ -n $run_directory ]] || return 1
  # The workers of a search count each its own.
  [[ $verb = train ]] || log=$run_directory/failures-$verb${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}.tsv
  printf '%(%FT%T%z)T\t%s\t%s\t%s\t%s\n' -1 "$(job_id)" "$(newest_step)" "$cause" "${2:-}" >>"$log" ||
    return 0
  # Failures before a restart by hand do not count.
  [[ $verb != train || ! -r $run_directory/logs/.forgiven ]] || num_cleared=$(<"$run_directory/logs/.forgiven")
  count_equal_failures "$cause" "${2:-}" < <(tail -n "+$((num_cleared + 1))" "$log")
  [[ $num_equal -lt $max_equal_failures ]]
}

# Sets `num_equal` from lines of failures.tsv, and `bad_nodes` to the nodes without which the next
# start is to be. Equal: the same text up to numbers and the node, and no new checkpoint between.
count_equal_failures() {
  local step text node name last newest
  newest=$(newest_step) last=$(kind_of_failure "$1" "$2")
  bad_nodes=()
  while IFS=$'\t' read -r _ _ step text node; do
    if [[ $step = "$newest" && $(kind_of_failure "$text" "$node") = "$last" ]]; then
      num_equal=$((num_equal + 1))
    else
      num_equal=0
    fi
    [[ $step = "$newest" ]] || bad_nodes=()
    # One failure may be of several.
    for name in ${node//,/ }; do
      [[ " ${bad_nodes[*]} " = *" $name "* ]] || bad_nodes+=("$name")
    done
  done
}

# What is the same in a failure that comes again: not the numbers, nor the nodes. A rank that died
# early has not told the others its node.
kind_of_failure() {
  local text=$1 name pattern='^(.*rank [0-9]+) on [^ :]+( process [0-9]+)?(.*)$'
  [[ ! $text =~ $pattern ]] || text=${BASH_REMATCH[1]}${BASH_REMATCH[3]}
  for name in ${2//,/ }; do text=${text//"$name"/}; done
  echo "${text//[0-9]/}"
}

# Records, for a sweep and `modtrain status`, that the run failed and is not restarted.
write_final_failure() {
  local text=${1//[[:cntrl:]]/ } file=$run_directory/failure.json
  [[ -n $run_directory && $verb = train ]] || return 0
  text=${text//\\/\\\\}
  { printf '{"kind": "job %s", "text": "%s", "time": "%(%FT%T%z)T", "job": "%s"}\n' \
    "$(job_id)" "${text//\"/\\\"}" -1 "$(job_id)" >"$file.part" && mv "$file.part" "$file"; } || true
}

# notify CAUSE: calls the program of the user's choice, which says that the run is given up.
notify() {
  [[ ${#on_given_up[@]} -gt 0 ]] || return 0
  say "calling ${on_given_up[0]}"
  MODTRAIN_RUN=$run_directory MODTRAIN_JOB=$(job_id) MODTRAIN_CAUSE=$1 \
    timeout --signal=KILL 60 "${on_given_up[@]}" </dev/null || say "${on_given_up[0]} failed"
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
  write_job "$file" "$(job_id)" null "$(submitted_script)"
}

# The script by the path that was submitted: this one may be Slurm's copy of it.
submitted_script() {
  local path=$script
  # Slurm's command is the path and the arguments, which may be of any number of words.
  if read_job_state && [[ $job_state =~ \ Command=(.*)\ WorkDir= ]]; then
    path=${BASH_REMATCH[1]}
    [[ ${#arguments[@]} -eq 0 ]] || path=${path%" ${arguments[*]}"}
  fi
  echo "$path"
}

# write_job FILE JOB PREVIOUS SCRIPT: appends a line in the format of `modtrain submit`.
write_job() {
  local text=${4//\\/\\\\}
  printf '{"job": "%s", "time": "%(%FT%T%z)T", "script": "%s", "chained_after": %s, "verb": "%s"}\n' \
    "$2" -1 "${text//\"/\\\"}" "$3" "$verb" >>"$1"
}

# Ends the job if `modtrain cancel` has listed it; for an array that file is one directory higher.
exit_if_cancelled() {
  local folder
  [[ -n $run_directory ]] || return 0
  for folder in "$run_directory" "$run_directory/.."; do
    [[ -r $folder/CANCELLED ]] || continue
    if grep -qxF -e "$(job_id)" -e "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$folder/CANCELLED"; then
      say "cancelled at step $(newest_step); the run can be submitted again"
      end_for_good 75
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
  read_outcome "$MODTRAIN_OUTCOME"
  rm -rf "$MODTRAIN_OUTCOME" || true
  remove_scratch
  [[ $status -ne 0 ]] || end_for_good 0
  exit_if_cancelled
  exit_if_scancelled
  case $status in
    2)
      record_failure "${cause:=the configuration is wrong}" || true
      write_final_failure "$cause"
      notify "$cause"
      say "not restarted: correct the configuration"
      end_for_good 2
      ;;
    73)
      # The job that is at work there counts its own failures. What is left of an earlier start on a
      # node that was lost ends by itself.
      if is_other_job_at_work; then
        say "not restarted: $cause"
        end_for_good 73
      fi
      ;;
    130) say "interrupted, not restarted"; end_for_good 130 ;;
    75) restart_job "stopped by a signal" ;;
  esac
  # A signal before modtrain has its handlers kills it, and a late one interrupts its exit. The exit
  # code does not show this: srun also ends the other tasks of a failed one by TERM.
  [[ -z $received_signal ]] || restart_job "stopped by $received_signal, without a checkpoint of its own"
  ! is_preempted || restart_job "stopped by a preemption, without a checkpoint of its own"
  # Equal steps diverge equally; a second try shows whether it was the machine.
  [[ $status -ne 65 || $max_equal_failures -le 2 ]] || max_equal_failures=2
  fail "$status" "${cause:-exit code $status}" "$bad_node"
}

# Whether Slurm runs another of the jobs that are recorded to train the run: not its evaluations.
is_other_job_at_work() {
  local ids
  [[ -n $run_directory ]] || return 1
  ids=$(sed -nE '/"verb": "eval"/d; s/.*"job": "([0-9_]+)".*/\1/p' "$run_directory/jobs.jsonl" 2>/dev/null |
    grep -vxF -e "$(job_id)" -e "${next_job:-none}" | sort -u | paste -sd,) || return 1
  [[ -n $(squeue --noheader --states=RUNNING,SUSPENDED --jobs="$ids" 2>/dev/null) ]]
}

# fail STATUS CAUSE [NODES]: records a failure, and restarts the job while that may help. NODES: those
# that it is of, parted by commas, if it is of some; the next start is without them.
fail() {
  say "failed: $2"
  wait_for_directory
  if record_failure "$2" "${3:-}"; then
    # Sites have more nodes than tries: what is wrong may be mended meanwhile.
    delay=$((num_equal > 0 ? retry_delay * 2 ** (num_equal - 1) : 0))
    stop_status=$1
    restart_job "failed at step $(newest_step)"
  fi
  if [[ -n $run_directory ]]; then
    say "failed $max_equal_failures times in this way without a new checkpoint: $2"
  fi
  write_final_failure "$2"
  notify "$2"
  say "not restarted"
  end_for_good "$1"
}

# Ends the job, and the one that waits to take its place: nothing is left that a restart would do.
end_for_good() {
  if [[ -n $next_job && $again = resubmit ]]; then
    scancel "$next_job" || say "cancel job $next_job by hand: it has nothing to do"
  fi
  exit "$1"
}

# Sets `job_state` to Slurm's description of this job; false without an answer.
read_job_state() {
  job_state=$(describe_job "$(job_id)")
}

describe_job() { scontrol --oneliner show job "$1" 2>/dev/null; }

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

# restart_job REASON: requeues the job, or lets the next one begin, as configured, and ends it.
restart_job() {
  local try output code=75
  trap '' USR1 TERM
  wait_for_directory
  exit_if_cancelled
  case $again in
    requeue)
      say "$1: requeued"
      # The controller may be unreachable for a while.
      for try in 1 2 3 4 5 6 7 8 9 10; do
        if output=$(scontrol requeue "$(job_id)" 2>&1); then
          delay_start "$(job_id)"
          # At once: until this script has ended, or been killed, the nodes are not free.
          exit 75
        fi
        say "requeueing failed ($try of 10): $output"
        [[ $output != *disabled* && $output != *denied* ]] || break
        sleep 15
      done
      say "it cannot be requeued: resubmitting"
      submit_next || say "resubmitting failed too: submit it by hand"
      ;;
    resubmit)
      say "$1: resubmitting"
      [[ -n $next_job ]] || submit_next || say "resubmitting failed: submit it by hand"
      ;;
    nothing)
      say "$1: the next job of the chain, or the same command, resumes"
      code=$stop_status next_job=$(next_of_chain)
      ;;
  esac
  [[ -z $next_job ]] || delay_start "$next_job"
  exit "$code"
}

# delay_start JOB: lets a waiting job start `delay` seconds from now, and not on `bad_nodes`.
delay_start() {
  local job=$1 excluded options=() begin state pattern=' ExcNodeList=([^ ]+)'
  if [[ ${#bad_nodes[@]} -gt 0 ]]; then
    if has_enough_nodes "$job"; then
      excluded=$(IFS=,; echo "${bad_nodes[*]}")
      say "the next start is without $excluded"
      # What was excluded before stays so.
      state=$(describe_job "$job") || true
      [[ ! $state =~ $pattern || ${BASH_REMATCH[1]} = '(null)' ]] || excluded+=,${BASH_REMATCH[1]}
      options+=("ExcNodeList=$excluded")
    else
      say "too few nodes would be left without ${bad_nodes[*]}: the next start may be on them again"
    fi
  fi
  if [[ $delay -gt 0 ]]; then
    printf -v begin '%(%FT%T)T' $(($(printf '%(%s)T' -1) + delay))
    # Slurm has its own delay after a requeue.
    state=$(describe_job "$job") || true
    [[ $state =~ \ EligibleTime=([0-9T:-]+) && ${BASH_REMATCH[1]} > $begin ]] ||
      options+=("StartTime=$begin")
  fi
  [[ ${#options[@]} -eq 0 ]] || scontrol update JobId="$job" "${options[@]}" ||
    say "job $job could not be given ${options[*]}"
}

# has_enough_nodes JOB: whether the partition has enough nodes at work, with the features that the job
# asks for, without `bad_nodes`.
has_enough_nodes() {
  local node state features wanted='' description count=0
  description=$(describe_job "$1") || true
  [[ ! $description =~ \ Features=([^ ]+) || ${BASH_REMATCH[1]} = '(null)' ]] || wanted=${BASH_REMATCH[1]}
  while read -r node state features; do
    case $state in *down* | *drain* | *drng* | *fail* | *maint* | *unk*) continue ;; esac
    [[ " ${bad_nodes[*]} " = *" $node "* ]] || ! has_features "$features" "$wanted" || count=$((count + 1))
  done < <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t %f')
  [[ $count -ge $SLURM_JOB_NUM_NODES ]]
}

# has_features FEATURES CONSTRAINT: whether a node with these, parted by commas, satisfies it, as
# `gpu&(a100|h100)`. False for numbers of nodes, alternatives for all nodes alike, and a mixture whose
# order Slurm and bash see differently: no node is left out then.
has_features() {
  local rest=$2 condition=''
  [[ -n $rest ]] || return 0
  [[ ! $rest =~ [\&,][^\(\)]*\| && ! $rest =~ \|[^\(\)]*[\&,] ]] || return 1
  while [[ -n $rest ]]; do
    if [[ $rest =~ ^[A-Za-z0-9_.:=-]+ ]]; then
      if [[ ",$1," = *",${BASH_REMATCH[0]},"* ]]; then condition+='1'; else condition+='0'; fi
      rest=${rest#"${BASH_REMATCH[0]}"}
      continue
    fi
    case $rest in
      [\&,]*) condition+='&&' ;;
      '|'*) condition+='||' ;;
      [\(\)]*) condition+=${rest:0:1} ;;
      *) return 1 ;;
    esac
    rest=${rest:1}
  done
  ((condition)) 2>/dev/null
}

# The job that was submitted to follow this one; empty: there is none.
next_of_chain() {
  [[ -n $run_directory ]] || return 0
  sed -nE "s/.*\"job\": \"([0-9_]+)\".*\"chained_after\": \"$(job_id)\".*/\1/p" \
    "$run_directory/jobs.jsonl" 2>/dev/null | tail -n 1 || true
}

# Has the next job wait from now on: when this node loses power, nobody could submit it. Slurm may
# have requeued this job then, and the one of the earlier start still waits.
queue_next() {
  next_job=$(next_of_chain)
  [[ -z $next_job || $(describe_job "$next_job") != *JobState=PENDING* ]] || return 0
  next_job=''
  submit_next || say "the next job is submitted when this one stops"
}

# Submits the job that continues when this one has ended, however that may be; sets `next_job`.
submit_next() {
  local next foreign task=${SLURM_ARRAY_TASK_ID:-} own=() folder
  # Only this task of an array is resubmitted.
  [[ -z $task ]] || own=(--array="$task")
  # The script's directives must not be overridden by the environment.
  unset SBATCH_TIMELIMIT SBATCH_REQUEUE SBATCH_NO_REQUEUE SBATCH_ARRAY_INX SBATCH_SIGNAL
  # Not after the delay that the script may ask for, as now+2hours.
  own+=(--dependency="afterany:$(job_id)" --begin=now)
  # Variables that describe this job must not reach the new one.
  mapfile -t foreign < <(compgen -v | grep -E '^(SLURM|_SLURM_SPANK)_' | grep -vxE 'SLURM_(CONF|CLUSTERS|JWT)')
  next=$(unset "${foreign[@]}" && sbatch --parsable "${own[@]}" "$script" "${arguments[@]}") || return
  next=${next%%;*}${task:+_$task}
  next_job=$next
  say "job $next resumes the run when this one stops"
  [[ -n $run_directory ]] || return 0
  # `modtrain cancel` of an array reads the directory above its runs.
  [[ $verb = train ]] || task=''
  for folder in "$run_directory" ${task:+"$run_directory/.."}; do
    write_job "$folder/jobs.jsonl" "$next" "\"$(job_id)\"" "$script"
  done
}
