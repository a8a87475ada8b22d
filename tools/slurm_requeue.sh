#!/usr/bin/env bash
# A SLURM job that is never lost: sbatch tools/slurm_requeue.sh RECIPE RUN_DIR
#
# Two minutes before its time is up (and when it is preempted) SLURM signals the job; every rank finishes its step, one
# saves, all exit, and the job puts itself back into the queue. --resume continues where it was. A rank
# that dies is started again by torchrun, up to three times. RUN_DIR must be on a disk that all nodes share.
#SBATCH --job-name=fastssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
recipe=${1:?usage: sbatch slurm_requeue.sh RECIPE RUN_DIR}
run_dir=${2:?usage: sbatch slurm_requeue.sh RECIPE RUN_DIR}
nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
port=$((29500 + SLURM_JOB_ID % 1000))

# Each machine's torchrun gets SIGTERM: it hands that on to its ranks, leaves them 30 s to save, and does not start
# them again as it would if they ended by themselves.
asked=0
stop_ranks() {
  asked=1
  srun --overlap --ntasks="$nodes" --ntasks-per-node=1 \
    pkill -TERM -f -- "python.*(torchrun|torch.distributed.run) .*-m fastssl train .*--run-dir $run_dir " || true
}
trap stop_ranks USR1 TERM

srun --ntasks="$nodes" --ntasks-per-node=1 \
  torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \
  -m fastssl train "$recipe" --run-dir "$run_dir" --resume &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step"
  code=$?
done

if [ "$code" -ne 0 ] && [ "$asked" = 1 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
