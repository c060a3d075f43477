# Shared by both batch scripts: one launcher on each node, a rendezvous on the first, and a requeue for a stopped run.
# Sourced with STAGE set; "$@" is the recipe and its overrides, which no shell evaluates.
set -euo pipefail

: "${1:?usage: sbatch launch/slurm/$STAGE.sbatch RECIPE [KEY=VALUE ...]}"
cd "${LODESTAR_HOME:-$SLURM_SUBMIT_DIR}"

# --- settings of the cluster: change them here -------------------------------------------------------------
PYTHON=${PYTHON:-.venv/bin/python}               # the environment, on a file system of all nodes
RANKS_PER_NODE=${RANKS_PER_NODE:-8}              # one per GPU
MOST_REQUEUES=${MOST_REQUEUES:-20}               # limit of requeues of a stopped run
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}     # CPU threads of each rank
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}       # nodes often have no internet: download models and data before
export WANDB_MODE=${WANDB_MODE:-offline}         # afterwards: wandb sync RUN_FOLDER/wandb/offline-*
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1         # ranks end, instead of hanging, when one is lost
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}   # collectives that the flight recorder holds
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}          # and writes to runs/slurm/JOB/nccl-RANK
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}   # lengths vary: less of a GPU's memory is lost
# export NCCL_SOCKET_IFNAME=ib0                  # the network interface for NCCL
# export NCCL_DEBUG=INFO
# -----------------------------------------------------------------------------------------------------------

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))
logs=runs/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$PWD/$logs/nccl-}

# SLURM sends the signal before the time limit to every process of the step. The launcher ignores it, because it would
# end without its ranks; the ranks save and stop.
srun --kill-on-bad-exit=0 bash -c '
    trap "" USR1
    exec "$0" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --nproc-per-node "$1" --master-addr "$2" --master-port "$3" --log-dir "$4/node-$SLURM_NODEID" --tee 3 \
        "launch/$5.py" --config "${@:6}"
' "$PYTHON" "$RANKS_PER_NODE" "${address:-$host}" "$port" "$logs" "$STAGE" "$@" || code=$?

# The run folder has the outcome, because launchers exit with 1 whatever their ranks return.
state=$("$PYTHON" "launch/$STAGE.py" --config "$@" --plan 1 --json | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["state"])')
echo "run: $state"
if [[ $state == stopped && ${SLURM_RESTART_COUNT:-0} -lt $MOST_REQUEUES ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
[[ $state == finished ]] || exit "${code:-1}"
