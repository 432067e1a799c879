# Environment of a rank on a site with NVIDIA GPUs and InfiniBand; sourced on every node, by the batch script and each rank.
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TRITON_CACHE_DIR=/tmp/triton-$USER # a cache shared by all nodes is written by all at once
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
unset NCCL_IB_DISABLE NCCL_NET_PLUGIN NCCL_P2P_DISABLE # left over from debugging, they slow down or crash large jobs
