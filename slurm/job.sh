# shellcheck shell=bash
# Common part of all job scripts, which source it; see docs/concepts/slurm-jobs.md.
#
# Variables that a script may set before (all have a default):
#   code           directory that holds modtrain/ and slurm/: a checkout, or what `modtrain submit` froze
#   python         interpreter that has modtrain's packages; in a container, the one inside
#   run_directory  where failures are recorded and checkpoints are searched; empty: nowhere
#   launcher       srun (a task for each process) or torchrun (a task for each node)
#   processes      processes on each node
#   container      none, apptainer or pyxis; image, mounts: its image, and the paths it can see
#   site_files     files to source; modules: modules to load; variables: NAME=VALUE to export
#   scratch        directory on the node's own disk, for the job's own directory of temporary files;
#                  empty: the system's
#   gpus           GPUs that the job has on each node; with some, training on the CPU is a failure
#   srun_options   options of the srun that starts the processes
#   on_given_up    program with its arguments that is called when a run is given up
#   log_size       MiB of the job's output after which an empty file continues it; num_logs: outputs of
#                  jobs that are kept in the run's directory
#   again          what follows a stop with work left: requeue, resubmit or nothing
#   retry_delay    seconds before the first restart after a failure; twice as long at each further one
#   lead, grace    seconds between the signal and the end, before the time limit and at a
#                  preemption; a save that takes longer is not started
#   script, verb   the script to resubmit with the same arguments, and the verb that it runs

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed, and this is $BASH_VERSION" >&2
  exit 2
}
arguments=("$@")
# Times are parsed below in their default format. The environment is passed on as a whole.
unset SLURM_TIME_FORMAT
export SLURM_EXPORT_ENV=ALL
: "${code:=${MODTRAIN_CODE:-${SLURM_SUBMIT_DIR:-$PWD}}}"
: "${run_directory:=}" "${launcher:=srun}" "${processes:=${SLURM_NTASKS_PER_NODE:-1}}"
: "${container:=none}" "${image:=}" "${scratch:=}" "${again:=requeue}" "${lead:=300}"
: "${gpus:=${SLURM_GPUS_ON_NODE:-0}}" "${grace:=30}" "${max_equal_failures:=3}" "${retry_delay:=60}" "${script:=$0}" "${verb:=train}"
: "${log_size:=64}" "${num_logs:=50}"
srun_options=(${srun_options[@]+"${srun_options[@]}"}) on_given_up=(${on_given_up[@]+"${on_given_up[@]}"})
mounts=(${mounts[@]+"${mounts[@]}"}) site_files=(${site_files[@]+"${site_files[@]}"})
modules=(${modules[@]+"${modules[@]}"}) variables=(${variables[@]+"${variables[@]}"})
if [[ -z ${python:-} ]]; then
  python=python3
  [[ $container != none || ! -x $code/.venv/bin/python ]] || python=$code/.venv/bin/python
fi

# A log that cannot be written at the moment must not end the job.
say() { printf '[%(%F %T)T] job %s: %s\n' -1 "$(job_id)" "$*" || true; }

# The id by which Slurm requeues this job: an array's task needs its index.
job_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  else
    echo "${SLURM_JOB_ID:-0}"
  fi
}

# ---- the node ----------------------------------------------------------------------------------

# False if this node cannot be used; `node_error` has the reason.
prepare_node() {
  local entry host
  node_error=
  # A site's files may use unset variables.
  set +u
  for entry in "${site_files[@]}"; do
    # shellcheck disable=SC1090
    source "$entry" || say "$entry ended with $?: continuing"
  done
  if [[ ${#modules[@]} -gt 0 ]] && ! module load "${modules[@]}"; then
    node_error="${modules[*]} could not be loaded on $(hostname)"
  fi
  set -u
  for entry in "${variables[@]}"; do export "${entry?}"; done
  if [[ -n $scratch ]]; then
    # What is not there would silently be /tmp, which may be small, or memory.
    [[ -d $scratch && -w $scratch ]] || node_error="scratch=$scratch is no directory to write to on $(hostname)"
    # Each process makes its node's directory of the job in it.
    MODTRAIN_SCRATCH=$scratch/modtrain-$(job_id)
    export TMPDIR="$scratch" MODTRAIN_SCRATCH
  fi
  # With `auto` a job that waited for GPUs would train on the CPU where they do not work.
  [[ $gpus = 0 ]] || export MODTRAIN_ACCELERATOR=cuda
  # The host's packages must not shadow those of the container.
  [[ $container = none ]] || PYTHONPATH=
  export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  # Since Slurm 22.05 each task of a step would get a single CPU without this.
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
  node_cpus=$((SRUN_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))
  local share=$((is_distributed == 1 ? node_cpus / processes : SRUN_CPUS_PER_TASK))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
  # Not through a pipe: with many names scontrol would fail when the reader exits first.
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || node_error="no names of $SLURM_JOB_NODELIST"
  host=${host%%$'\n'*}
  # Below the ephemeral ports; differs between jobs on a node.
  export MASTER_ADDR="$host" MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
  export MODTRAIN_LEAD="$lead" MODTRAIN_GRACE="$grace"
  # The layout for srun where it does not follow from the job.
  local each=$processes cpus=$SRUN_CPUS_PER_TASK
  [[ $launcher != torchrun ]] || each=1 cpus=$node_cpus
  srun_layout=(--ntasks=$((SLURM_JOB_NUM_NODES * each)) --ntasks-per-node="$each" --cpus-per-task="$cpus")
  # The container needs scratch mounted.
  [[ -z $scratch || " ${mounts[*]}" = *" $scratch"* ]] || mounts+=("$scratch")
  [[ -z $node_error ]]
}

# set_command VERB OVERRIDE...: the command for a node, inside the container if there is one.
set_command() {
  local mount launch=("$python" -m modtrain)
  local signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  if [[ $launcher = torchrun && $is_distributed -eq 1 ]]; then
    # Signals are forwarded to the workers, which have the job's time to save.
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
      # pyxis needs both sides of a mount.
      for mount in "${mounts[@]}"; do pairs+=("$mount$([[ $mount = *:* ]] || echo ":$mount")"); done
      in_container=(--container-image="$image" --container-workdir="$PWD" --no-container-mount-home)
      [[ ${#pairs[@]} -eq 0 ]] || in_container+=(--container-mounts="$(IFS=,; echo "${pairs[*]}")")
      ;;
    *) say "container=$container is not none, apptainer or pyxis"; exit 2 ;;
  esac
}

# ---- the step ----------------------------------------------------------------------------------

# Runs a step to its end, whatever signals arrive; sets `status` to its exit code.
run_step() {
  local step
  MODTRAIN_OUTCOME=$(outcome_directory)
  export MODTRAIN_OUTCOME
  note_log
  bound_logs &
  local bounding=$!
  srun --kill-on-bad-exit=1 --label "${srun_options[@]}" "$@" &
  step=$!
  step_pid=$step
  [[ -z $received_signal ]] || forward_signal "$received_signal"
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  status=0
  wait "$step" || status=$?
  step_pid=
  kill "$bounding" 2>/dev/null || true
}

# An empty directory, which all nodes see, for the outcome of each process.
outcome_directory() {
  local folder=$PWD
  [[ -z $run_directory ]] || folder=$run_directory/logs
  folder+=/.outcome-$(job_id)
  # One that was not removed is of an earlier start.
  rm -rf "$folder" || true
  mkdir -p "$folder" || true
  echo "$folder"
}

# This shell receives the signals (--signal=B:USR1@...), so that none is lost before the step starts.
trap_signals() {
  received_signal='' step_pid='' got_usr1='' job_state=''
  next_job='' bad_nodes=() delay=0 stop_status=75
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
}

on_signal() {
  local first=$received_signal
  received_signal=$1
  [[ $1 != USR1 ]] || got_usr1=yes
  # Some sites send this signal for a preemption too, which leaves less time.
  [[ $1 != USR1 ]] || ! is_preempted || received_signal=TERM
  [[ -n $first || -z $step_pid ]] || forward_signal "$received_signal"
}

forward_signal() {
  say "$1: the step is signalled to save and stop"
  # By the full id: the number of an array's last task is also that of the array. By scancel, which
  # reaches the tasks on all nodes; srun does not always forward a signal.
  scancel --signal="$1" "$(job_id)" || kill -"$1" "$step_pid" 2>/dev/null || true
}

# shellcheck source=outcome.sh
source "${BASH_SOURCE[0]%/*}/outcome.sh"
# shellcheck source=files.sh
source "${BASH_SOURCE[0]%/*}/files.sh"
# shellcheck source=ending.sh
source "${BASH_SOURCE[0]%/*}/ending.sh"

# ---- what a script calls -----------------------------------------------------------------------

# on_all VERB OVERRIDE...: `processes` on each node, one for each GPU.
on_all() {
  is_distributed=1
  begin "$@"
  if [[ $launcher = torchrun ]]; then
    run_step "${srun_layout[@]}" "${in_container[@]}" "${command[@]}"
  else
    run_step "${in_container[@]}" "${command[@]}"
  fi
  finish
}

# on_one VERB OVERRIDE...: a single process.
on_one() {
  is_distributed=0
  begin "$@"
  run_step --nodes=1 --ntasks=1 "${in_container[@]}" "${command[@]}"
  finish
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

begin() {
  trap_signals
  [[ -n $run_directory || $1 != train ]] || run_directory=$(run_of "${@:2}")
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
  # A requeued job may start before scancel takes it out of the queue.
  exit_if_cancelled
  # A name of the run's own would be another one in the job that takes this one's place.
  [[ $1 != train || -n $run_directory ]] || fail 2 'a job needs the name of its run: add name=my_run'
  record_job || true
  clear_failure || true
  [[ $again != resubmit ]] || queue_next
  export_times
  prepare_node || fail 69 "$node_error" "${SLURMD_NODENAME:-}"
  set_command "$@"
  if [[ -n $received_signal ]]; then restart_job "stopped by $received_signal before it started"; fi
}

# Exports since when the job could have started, and when it did, for the record of what a run takes.
export_times() {
  local eligible started
  read_job_state || return 0
  [[ $job_state =~ \ EligibleTime=([0-9T:-]+) ]] || return 0
  eligible=$(date -d "${BASH_REMATCH[1]}" +%s) || return 0
  [[ $job_state =~ \ StartTime=([0-9T:-]+) ]] || return 0
  started=$(date -d "${BASH_REMATCH[1]}" +%s) || return 0
  export MODTRAIN_JOB_TIMES="$eligible $started"
}

# Keeps the nodes until the job is cancelled or its time is over, and prints how to use them.
keep_nodes() {
  is_distributed=1
  prepare_node || say "$node_error"
  set_command train name=debug
  local environment=(MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" PYTHONPATH="$PYTHONPATH"
    OMP_NUM_THREADS="$OMP_NUM_THREADS" "${variables[@]}")
  say "on $SLURM_JOB_NODELIST; a shell on the first node:"
  echo "  srun --jobid=$SLURM_JOB_ID --overlap --nodes=1 --ntasks=1 ${in_container[*]@Q} --pty bash -l"
  say "a run on all of them:"
  echo "  env ${environment[*]@Q} srun --jobid=$SLURM_JOB_ID --overlap ${srun_options[*]@Q} ${srun_layout[*]} ${in_container[*]@Q} ${command[*]@Q}"
  say "release them with: scancel $SLURM_JOB_ID"
  sleep infinity
}
