# shellcheck shell=bash
# The job's own files: its output, which is bounded in size and number, for a run may take months; and
# its temporary files. `job.sh` sources this file.

# Seconds between two looks at the size.
log_interval=60

# Keeps the logs small while the step runs.
bound_logs() {
  local nothing
  trap - USR1
  trap 'exit 0' TERM
  remove_old_logs || true
  # What never has a line, for a wait without a process that would outlive this one.
  exec {nothing}<> <(:)
  while :; do
    rotate_log || true
    read -r -t "$log_interval" -u "$nothing" || true
  done
}

# Continues a large log in an empty file; Slurm appends to it, whatever its size. The parts before are
# LOG.1, the newest, to LOG.3.
rotate_log() {
  local part size
  [[ -n $log_file && -f $log_file ]] || return 0
  size=$(stat -c %s "$log_file") || return 0
  [[ $size -gt $((log_size * 1048576)) ]] || return 0
  for part in 2 1; do
    [[ ! -e $log_file.$part ]] || mv -f "$log_file.$part" "$log_file.$((part + 1))" || return 0
  done
  # By a copy: the processes have the file open.
  cp -p "$log_file" "$log_file.1" && : >"$log_file" || true
}

# Removes the oldest outputs of jobs in the run's directory, with their parts.
remove_old_logs() {
  local file kept=0
  [[ -n $run_directory && -d $run_directory/logs ]] || return 0
  while IFS= read -r -d '' file; do
    file=${file#* }
    kept=$((kept + 1))
    [[ $kept -le $num_logs || $file = "$log_file" ]] || rm -f "$file" "$file".[123] || true
  done < <(find "$run_directory/logs" -maxdepth 1 -name 'slurm-*.out' -printf '%T@ %p\0' | sort -znr)
}

# Removes the job's temporary files from all nodes. Not after a signal: there may be no time left, and
# it is the same directory at the next start.
remove_scratch() {
  [[ -n $scratch && -z $received_signal ]] || return 0
  timeout --signal=KILL 20 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    rm -rf -- "$MODTRAIN_SCRATCH" >/dev/null 2>&1 || true
}
