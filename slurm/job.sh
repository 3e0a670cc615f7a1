# shellcheck shell=bash
# What every job script here has in common; it is sourced, and docs/cluster.md explains it.
#
# What a script may set before (all have a default):
#   code           directory that holds modtrain/ and slurm/: a checkout, or what `modtrain submit` froze
#   python         interpreter that has modtrain's packages; in a container, the one inside
#   run_directory  where failures are noted and checkpoints are looked for; empty: nowhere
#   launcher       srun (a task for each process) or torchrun (a task for each node)
#   processes      processes on each node
#   container      none, apptainer or pyxis; image, mounts: what runs in it, and what it sees
#   site_files     files to source; modules: modules to load; variables: NAME=VALUE to export
#   scratch        directory on the node's own disk for temporary files; empty: the system's
#   again          what comes after a stop with work left: requeue, resubmit or nothing
#   lead, grace    seconds from the signal before the time limit, and from that of a preemption, to
#                  the end; a save that takes longer is not begun
#   script, verb   what is submitted again, with the same arguments, and what it does

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed here, and this is $BASH_VERSION" >&2
  exit 2
}
arguments=("$@")
# How times are shown is read here, and what this job's environment lets through is all or nothing.
unset SLURM_TIME_FORMAT
export SLURM_EXPORT_ENV=ALL
: "${code:=${MODTRAIN_CODE:-${SLURM_SUBMIT_DIR:-$PWD}}}"
: "${run_directory:=}" "${launcher:=srun}" "${processes:=${SLURM_NTASKS_PER_NODE:-1}}"
: "${container:=none}" "${image:=}" "${scratch:=}" "${again:=requeue}" "${lead:=300}"
: "${grace:=30}" "${alike_failures:=3}" "${script:=$0}" "${verb:=train}"
mounts=(${mounts[@]+"${mounts[@]}"}) site_files=(${site_files[@]+"${site_files[@]}"})
modules=(${modules[@]+"${modules[@]}"}) variables=(${variables[@]+"${variables[@]}"})
if [[ -z ${python:-} ]]; then
  python=python3
  [[ $container != none || ! -x $code/.venv/bin/python ]] || python=$code/.venv/bin/python
fi

# The log may lie where nothing can be written just now, which is no reason to end.
say() { printf '[%(%F %T)T] job %s: %s\n' -1 "$(job_id)" "$*" || true; }

# The name under which Slurm requeues this job: an array's task is not known by its number alone.
job_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  else
    echo "${SLURM_JOB_ID:-0}"
  fi
}

# ---- the node ----------------------------------------------------------------------------------

# False where this node is of no use, and then says why in `unfit`.
prepare_node() {
  local entry host
  unfit=
  # Their own variables are not ours to judge.
  set +u
  for entry in "${site_files[@]}"; do
    # shellcheck disable=SC1090
    source "$entry" || say "$entry ended with $?: goes on"
  done
  if [[ ${#modules[@]} -gt 0 ]] && ! module load "${modules[@]}"; then
    unfit="${modules[*]} could not be loaded on $(hostname)"
  fi
  set -u
  for entry in "${variables[@]}"; do export "${entry?}"; done
  [[ -z $scratch ]] || export TMPDIR="$scratch"
  # A container has packages of its own, which the host's must not hide.
  [[ $container = none ]] || PYTHONPATH=
  export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  # Without it each task of a step would be given a single CPU since Slurm 22.05.
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
  node_cpus=$((SRUN_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))
  local share=$((several == 1 ? node_cpus / processes : SRUN_CPUS_PER_TASK))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
  # Not through a pipe: of many names scontrol would not be done when the reader is.
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || unfit="no names of $SLURM_JOB_NODELIST"
  host=${host%%$'\n'*}
  # Below the ports that the system gives away; another one for each job on a node.
  export MASTER_ADDR="$host" MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
  export MODTRAIN_LEAD="$lead" MODTRAIN_GRACE="$grace"
  # How srun is to start the processes, where it does not have it from the job.
  local each=$processes cpus=$SRUN_CPUS_PER_TASK
  [[ $launcher != torchrun ]] || each=1 cpus=$node_cpus
  spread=(--ntasks=$((SLURM_JOB_NUM_NODES * each)) --ntasks-per-node="$each" --cpus-per-task="$cpus")
  # A container sees it like any other node's directory.
  [[ -z $scratch || " ${mounts[*]}" = *" $scratch"* ]] || mounts+=("$scratch")
  [[ -z $unfit ]]
}

# modtrain VERB OVERRIDE...: what to run on a node, in the container where there is one.
set_command() {
  local mount launch=("$python" -m modtrain)
  local signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  if [[ $launcher = torchrun && $several -eq 1 ]]; then
    # The signals go on to the workers, which have as long as the job to save.
    launch=("$python" -m torch.distributed.run
      --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" --max-restarts 0
      --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
      --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
      --signals-to-handle "$signals" --shutdown-timeout "$lead"
      -m modtrain)
  fi
  command=("${launch[@]}" "$@")
  in_container=()
  case $container in
    none) ;;
    apptainer)
      local binds=()
      for mount in "${mounts[@]}"; do binds+=(--bind "$mount"); done
      command=(apptainer exec --nv "${binds[@]}" --pwd "$PWD" "$image" "${command[@]}")
      ;;
    pyxis)
      local pairs=()
      # Both sides are named there.
      for mount in "${mounts[@]}"; do pairs+=("$mount$([[ $mount = *:* ]] || echo ":$mount")"); done
      in_container=(--container-image="$image" --container-workdir="$PWD" --no-container-mount-home)
      [[ ${#pairs[@]} -eq 0 ]] || in_container+=(--container-mounts="$(IFS=,; echo "${pairs[*]}")")
      ;;
    *) say "container=$container is not none, apptainer or pyxis"; exit 2 ;;
  esac
}

# ---- the step ----------------------------------------------------------------------------------

# Runs a step to its end, whatever signals come meanwhile; leaves its exit code in `status`.
run_step() {
  local step
  MODTRAIN_OUTCOME=$(outcome_file)
  export MODTRAIN_OUTCOME
  rm -f "$MODTRAIN_OUTCOME" || true
  srun --kill-on-bad-exit=1 --label "$@" &
  step=$!
  step_pid=$step
  [[ -z $asked ]] || pass_on "$asked"
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  status=0
  wait "$step" || status=$?
  step_pid=
}

outcome_file() {
  local folder=$PWD
  [[ -z $run_directory ]] || folder=$run_directory/logs
  mkdir -p "$folder" || folder=${TMPDIR:-/tmp}
  echo "$folder/.outcome-$(job_id)"
}

# This shell has the signals (--signal=B:USR1@...), so that none is lost before the step begins.
watch_signals() {
  asked='' step_pid='' warned=''
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
}

on_signal() {
  local first=$asked
  asked=$1
  [[ $1 != USR1 ]] || warned=yes
  # Some sites send the signal of the time limit for a preemption too, which leaves less time.
  [[ $1 != USR1 ]] || ! is_preempted || asked=TERM
  [[ -n $first || -z $step_pid ]] || pass_on "$asked"
}

pass_on() {
  say "$1: the step is asked to save and to end"
  # By the task's own name: the number of an array's last task is that of the array, too.
  # Through Slurm, which reaches the tasks on all nodes; srun keeps the signal for itself at times.
  scancel --signal="$1" "$(job_id)" || kill -"$1" "$step_pid" 2>/dev/null || true
}

# ---- after it ----------------------------------------------------------------------------------

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
  local shown submitted
  shown=$(scontrol --oneliner show job "$(job_id)" 2>/dev/null) || return 1
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
  local shown
  [[ $again = requeue && -n $asked && -z $warned ]] || return 0
  ! is_preempted || return 0
  shown=$(scontrol --oneliner show job "$(job_id)" 2>/dev/null) || return 0
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

# Whether Slurm takes the nodes away; the signal of that comes to the tasks alone. Slurm may remember
# an earlier start's preemption.
is_preempted() {
  local shown began
  shown=$(scontrol --oneliner show job "$(job_id)" 2>/dev/null) || return 1
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

# ---- what a script calls -----------------------------------------------------------------------

# on_all VERB OVERRIDE...: `processes` on each node, one for each GPU.
on_all() {
  several=1
  begin "$@"
  if [[ $launcher = torchrun ]]; then
    run_step "${spread[@]}" "${in_container[@]}" "${command[@]}"
  else
    run_step "${in_container[@]}" "${command[@]}"
  fi
  finish
}

# on_one VERB OVERRIDE...: a single process.
on_one() {
  several=0
  begin "$@"
  run_step --nodes=1 --ntasks=1 "${in_container[@]}" "${command[@]}"
  finish
}

begin() {
  watch_signals
  [[ -n $run_directory || $1 != train ]] || run_directory=$(run_of "${@:2}")
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
  # A job that was requeued may start before it is taken out of the queue.
  stop_if_cancelled
  note_job || true
  forgive || true
  prepare_node || fail 1 "$unfit"
  set_command "$@"
  if [[ -n $asked ]]; then go_on "stopped by $asked before it began"; fi
}

# Keeps the nodes until the job is cancelled or its time is over, and tells how to use them.
hold() {
  several=1
  prepare_node || say "$unfit"
  set_command train name=debug
  local environment=(MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" PYTHONPATH="$PYTHONPATH"
    OMP_NUM_THREADS="$OMP_NUM_THREADS" "${variables[@]}")
  say "on $SLURM_JOB_NODELIST; a shell on the first node:"
  echo "  srun --jobid=$SLURM_JOB_ID --overlap --nodes=1 --ntasks=1 ${in_container[*]@Q} --pty bash -l"
  say "a run on all of them:"
  echo "  env ${environment[*]@Q} srun --jobid=$SLURM_JOB_ID --overlap ${spread[*]} ${in_container[*]@Q} ${command[*]@Q}"
  say "give them back by: scancel $SLURM_JOB_ID"
  sleep infinity
}
