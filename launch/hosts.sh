#!/usr/bin/env bash
# Train on several hosts with the deepspeed launcher over ssh; the repository stands at the same path on all of them:
#   launch/hosts.sh HOSTFILE launch/configs/china_128x256.yaml [key=value ...]
# HOSTFILE as launch/hostfile.example. ssh must reach every host without a question.
set -eu
hostfile=${1:?a hostfile, as launch/hostfile.example}
config=${2:?a configuration}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$here/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks=$(awk '!/^ *#/ { for (i = 1; i <= NF; i++) if (sub(/^slots=/, "", $i)) n += $i } END { print n + 0 }' "$hostfile")
# ssh does not carry the environment: what the ranks need travels in this file.
environment=$(mktemp)
trap 'rm -f "$environment"' EXIT
env | grep -E '^(PATH|OMP_NUM_THREADS|DS_ACCELERATOR|LD_LIBRARY_PATH|(NCCL|GLOO|FI|UCX|TORCH|TRITON|CUDA|HIP|HSA|ROCR|MIOPEN)_[A-Z0-9_]*)=' >"$environment"
DS_ENV_FILE="$environment" deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
  ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} "$here/trainer/train.py" --config "$config" --world-size "$ranks" "$@"
