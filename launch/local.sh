#!/usr/bin/env bash
# Train on the GPUs (or, without any, on two CPU ranks) of this machine:
#   launch/local.sh [--max-restarts N] launch/configs/demo.yaml [--deepspeed_config ds_configs/zero2.json] [key=value ...]
# With --max-restarts a run that dies (not one that is refused, finished, or stopped on request) is started again.
set -u
restarts=0
if [ "${1-}" = --max-restarts ]; then
  restarts=$2
  shift 2
fi
config=${1:?a configuration, as launch/configs/demo.yaml}
shift
here=$(cd "$(dirname "$0")/.." && pwd)
PATH="$here/.venv/bin:$PATH"
ranks=${RANKS:-$(python -c "import torch; print(torch.cuda.device_count() or 2)")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# `deepspeed` dies of a signal and leaves its ranks running; its child passes the signal on to them.
end() {
  restarts=0
  until children=$(cat "/proc/$runner/task/$runner/children" 2>/dev/null) && [ -n "$children" ]; do
    kill -0 "$runner" 2>/dev/null || return 0
    sleep 0.2 # it has not started its child yet
  done
  for child in $children; do kill -TERM "$child"; done
}
trap end TERM INT

while true; do
  deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-29500}" "$here/trainer/train.py" --config "$config" \
    --world-size "$ranks" "$@" &
  runner=$!
  wait "$runner"
  code=$?
  while kill -0 "$runner" 2>/dev/null; do # a signal ends `wait` before the run has saved
    wait "$runner"
    code=$?
  done
  case $code in 0 | 2 | 75) exit "$code" ;; esac
  [ "$restarts" -gt 0 ] || exit "$code"
  restarts=$((restarts - 1))
  echo "launch/local.sh: the run ended with code $code; starting it again, $restarts restarts left" >&2
done
