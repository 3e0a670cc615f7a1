# shellcheck shell=bash
# How the step of a job ended: from the files of its processes, and where one has left none, from
# what srun has printed. `job.sh` sources this file.

# read_outcome FOLDER: sets `status` (from srun's exit code), `cause`, and `bad_node`: the nodes
# where it failed for a reason that other nodes may not have, parted by commas; empty: none is known.
#   65 diverged, 69 this node cannot run it, 73 the run is in use, 75 stopped, 2 configuration,
#   130 interrupted: see docs/reference/exit-codes.md
# A code that no process has written means nothing: 2 is also what srun and Python end with where
# a program is missing.
read_outcome() {
  local folder=$1 file rank code node reason chosen='' first='' bad=''
  cause='' bad_node=''
  for file in "$folder"/rank-*; do
    [[ -r $file ]] || continue
    read_outcome_file "$file" || continue
    rank=${file##*/rank-}
    # Rank 0 knows of the others' errors; but a node that cannot run it kills the rest.
    if [[ $code = 69 ]]; then
      [[ -n $bad ]] || chosen=$file
      # Each may be unable for its own reason, and all may name the same ones.
      for node in ${node//,/ }; do [[ ",$bad," = *",$node,"* ]] || bad+=${bad:+,}$node; done
    fi
    [[ -z $bad && $code != running ]] || continue
    [[ $rank != 0 ]] || chosen=$file
    [[ $code = 0 || -n $first ]] || first=$file
  done
  : "${chosen:=$first}"
  if [[ -n $chosen ]]; then
    read_outcome_file "$chosen"
    rank=${chosen##*/rank-}
    # torchrun has one exit code for all failures.
    status=$code cause=$reason
    # The check before the first step names the nodes itself, on every rank.
    [[ $code != 69 || $reason = StartCheckError:* ]] || cause="rank $rank on $node: $reason"
    bad_node=$bad
    [[ $status -eq 0 || -n $cause ]] || cause="exit code $status"
  elif [[ $status -ne 0 ]]; then
    read_srun_error "$folder"
    case $status in 2 | 65 | 69 | 73 | 75 | 130) status=1 ;; esac
  fi
}

# Sets code, node and reason of one file.
read_outcome_file() {
  code='' node='' reason=''
  { read -r code && read -r node && read -r reason; } <"$1" || true
  [[ $code = running || $code =~ ^[0-9]+$ ]]
}

# Sets `cause` and `bad_node` from the first process that srun reports: it ends the others.
read_srun_error() {
  local folder=$1 node rank text lines line pattern='srun: error: ([^ :]+): tasks? ([0-9]+)[^:]*: (.*)'
  cause="exit code $status"
  while read -r line; do
    [[ $line =~ $pattern ]] || continue
    node=${BASH_REMATCH[1]} rank=${BASH_REMATCH[2]} text=${BASH_REMATCH[3]}
    lines=$(last_lines_of "$rank")
    cause="rank $rank on $node: $text${lines:+: $lines}"
    # What a signal has ended was at work; so was what has left a file, where it could leave one.
    if [[ $text = Exited* ]] && is_writable "$folder" && ! grep -qsxF -- "$node" "$folder"/rank-*; then
      bad_node=$node
      cause="rank $rank on $node: $text before modtrain started${lines:+: $lines}"
    fi
    return
  done < <(step_output)
}

# Whether a file can be written in a directory. On a full disk it can be made, and stays empty.
is_writable() {
  local file=$1/.test
  { echo test >"$file"; } 2>/dev/null && [[ -s $file ]]
}

# last_lines_of RANK: what a process has printed last, on one line, in UTF-8: it becomes JSON.
last_lines_of() {
  step_output | sed -nE "s/^ *$1: //p; /^slurmstepd: error: /p" | grep -v '^ *$' | tail -n 4 |
    cut -c -400 | { iconv -c -f UTF-8 -t UTF-8 2>/dev/null || cat; } | tr '\t\n' '  ' |
    sed 's/ *$//' || true
}

# What this step has printed into the job's log, at most the last MiB.
step_output() {
  [[ -n $log_file && -r $log_file ]] || return 0
  # It has been continued in an empty file.
  [[ $(stat -c %s "$log_file") -ge $log_start ]] || log_start=0
  tail -c "+$((log_start + 1))" "$log_file" | tail -c 1048576
}

# Where this script's output goes, and how much of it there is before the step.
note_log() {
  log_file=$(readlink "/proc/$$/fd/2") || log_file=''
  [[ -f $log_file ]] || log_file=''
  log_start=0
  [[ -z $log_file ]] || log_start=$(stat -c %s "$log_file") || log_start=0
}
