#!/bin/bash
# sbatch docs/slurm.sh PRESET RUN [KEY=VALUE ...]
#SBATCH --job-name=unilatent
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# Three minutes before the end this script, and no other process, gets SIGUSR1.

preset=$1 run=$2
shift 2
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 120 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$host:29500" \
    -m -- unilatent train "$preset" --out "$run" --resume auto "$@" &
step=$!

again() {
    trap - USR1
    scancel --signal=TERM "$SLURM_JOB_ID.0" # to the agents, which pass it on: a checkpoint is written
    wait "$step"
    unilatent runs "$run" --all-finished || scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1
wait "$step"
