#!/usr/bin/env bash
# Train on the visible GPUs (or, without any, on two CPU ranks) of this machine, under DeepSpeed's launcher of a host:
#   launch/local.sh [--max-restarts N] launch/configs/demo.yaml [--deepspeed_config ds_configs/zero2.json] [key=value ...]
# GPUs are those of CUDA_VISIBLE_DEVICES, by index or UUID; RANKS takes fewer of them. With --max-restarts a run that dies
# (not one that is refused, finished, or stopped on request) is started again. Ctrl-C: finish the step, save, exit with 75.
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
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# `deepspeed --num_gpus` would replace CUDA_VISIBLE_DEVICES by 0, 1, ...; its launcher of a host takes any names of devices.
# Where torch sees no GPU, none is named: -1 stays hidden.
read -r ranks world accelerator < <(python - "${RANKS-}" "${CUDA_VISIBLE_DEVICES-}" <<'PYTHON'
import base64, json, os, sys
visible = [device.strip() for device in sys.argv[2].split(",") if device.strip()]
if sys.argv[1] and visible and os.environ.get("CUDA_VISIBLE_DEVICES") != "-1":
    found = len(visible)  # the ranks themselves will tell if there is no such GPU
else:
    import torch
    found = torch.cuda.device_count()
ranks = int(sys.argv[1] or found or 2)
if visible and 0 < found < ranks:
    sys.exit(f"launch/local.sh: RANKS={ranks}, and CUDA_VISIBLE_DEVICES names {found} GPUs: start one rank a GPU")
devices = ["-1"] * ranks if not found else visible[:ranks] or list(range(ranks))
print(ranks, base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode(), "" if found else "cpu")
PYTHON
)
[ -n "$world" ] || exit 2
[ -z "$accelerator" ] || export DS_ACCELERATOR=$accelerator # or DeepSpeed would say that it has found no GPU
TOPOFLOW_ERROR_FILE=$(mktemp)
export TOPOFLOW_ERROR_FILE
trap 'rm -f "$TOPOFLOW_ERROR_FILE"' EXIT

# The launcher answers a signal by killing its ranks 30 s later; so it is kept out of the terminal's group, and the ranks are
# told themselves. They finish their step and save; told again, they end at once.
set -m
runner= stopped=
ranks_of_runner() { # by /proc, since images without procps have no pgrep; the parent is the second field after the name
  local stat line fields
  for stat in /proc/[0-9]*/stat; do
    read -r line 2>/dev/null <"$stat" || continue
    read -r -a fields <<<"${line##*) }"
    [ "${fields[1]}" != "$runner" ] || printf '%s ' "${line%% *}"
  done
}
tell() {
  stopped=1
  [ -n "$runner" ] || return 0
  for _ in $(seq 100); do
    children=$(ranks_of_runner)
    [ -z "$children" ] || break
    kill -0 "$runner" 2>/dev/null || return 0
    sleep 0.1 # it has not started its ranks yet
  done
  for child in $children; do kill -TERM "$child" 2>/dev/null; done
}
trap tell TERM INT HUP

while true; do
  : >"$TOPOFLOW_ERROR_FILE"
  port=${MASTER_PORT:-$(python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")}
  [ -z "$stopped" ] || exit 75 # told between two starts
  python -m deepspeed.launcher.launch --log_level=critical --world_info="$world" --master_addr=127.0.0.1 \
    --master_port="$port" "$here/trainer/train.py" --config "$config" --world-size "$ranks" "$@" &
  runner=$!
  [ -z "$stopped" ] || tell # told while it was being started
  wait "$runner"
  code=$?
  while kill -0 "$runner" 2>/dev/null; do # a signal ends `wait` before the run has saved
    wait "$runner"
    code=$?
  done
  runner=
  case $code in 0 | 75) exit "$code" ;; esac
  if [ "$code" = 2 ] || [ -n "$stopped" ] || [ "$restarts" -le 0 ]; then
    [ -s "$TOPOFLOW_ERROR_FILE" ] && echo "launch/local.sh: the run ended with code $code:" >&2 && cat "$TOPOFLOW_ERROR_FILE" >&2
    exit "$code"
  fi
  restarts=$((restarts - 1))
  echo "launch/local.sh: the run ended with code $code; starting it again, $restarts restarts left" >&2
done
