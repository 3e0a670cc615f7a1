# shellcheck shell=bash
# What every job script here has in common; it is sourced, and docs/concepts/slurm-jobs.md explains it.
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
  asked='' step_pid='' warned='' shown=''
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

# shellcheck source=ending.sh
source "${BASH_SOURCE[0]%/*}/ending.sh"

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
