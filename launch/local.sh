#!/usr/bin/env bash
# Train on the GPUs (or, without any, on two CPU ranks) of this machine:
#   launch/local.sh launch/configs/demo.yaml [--deepspeed_config ds_configs/zero2.json] [key=value ...]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
PATH="$here/.venv/bin:$PATH"
ranks=${RANKS:-$(python -c "import torch; print(torch.cuda.device_count() or 2)")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
config=${1:?a configuration, as launch/configs/demo.yaml}
shift
exec deepspeed --num_gpus "$ranks" "$here/trainer/train.py" --config "$config" "$@"
