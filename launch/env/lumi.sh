# Environment of a rank on LUMI-G (4 MI250X, 8 GPU dies a node); sourced on every node, by the batch script and each rank.
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=6 # the masks below hold six cores each
# MIOpen keeps SQLite files: on one file system shared by all nodes they lock. /tmp is each node's own.
export MIOPEN_USER_DB_PATH=/tmp/miopen-$USER-${SLURM_JOB_ID:-0} MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen-$USER-${SLURM_JOB_ID:-0}
mkdir -p "$MIOPEN_USER_DB_PATH"
export TRITON_CACHE_DIR=/tmp/triton-$USER
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3 # the Slingshot interfaces
export NCCL_NET_GDR_LEVEL=3
unset NCCL_IB_DISABLE NCCL_NET_PLUGIN
# Without the libfabric plugin RCCL falls back to TCP, ten times slower, and says nothing.
if ! find ${LD_LIBRARY_PATH:+${LD_LIBRARY_PATH//:/ }} /nonexistent -maxdepth 1 -name 'librccl-net*.so' 2>/dev/null | grep -q .; then
  echo "launch/env/lumi.sh: no librccl-net.so on LD_LIBRARY_PATH: load the aws-ofi-rccl module" >&2
  exit 1
fi
# Cores next to each GPU die; the first core of each group belongs to the system.
export CPU_BIND=mask_cpu:7e000000000000,7e00000000000000,7e0000,7e000000,7e,7e00,7e00000000,7e0000000000
