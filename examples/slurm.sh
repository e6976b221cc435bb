#!/bin/bash
# Train on a SLURM cluster with torchrun; what follows the file's name are options of `betaclip train`:
#
#     sbatch examples/slurm.sh --config vit_b16_sharegpt4v_ce --data.annotations FILE.json
#
# A preempted job, and one whose time is over, saves a checkpoint, is queued again, and goes on from there.
#SBATCH --job-name=betaclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# The batch shell gets SIGUSR1 five minutes before the end, and passes it on by srun and torchrun to the trainer, which ends
# its step, saves and exits. At SIGTERM the trainer does the same, and SLURM itself queues a preempted job again.
requeue=0
trap 'requeue=1; kill -USR1 "$step"' USR1
trap 'kill -TERM "$step"' TERM

# A job that is queued again keeps its number, so --run.resume finds its folder.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torch 2.11's torchrun kills 30 seconds after it has passed a signal on; later ones can be told to wait for the checkpoint.
wait=$(torchrun --help | grep -q -e --shutdown-timeout && echo --shutdown-timeout 240)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$host:29500" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 $wait \
    -m betaclip train --run.name "$SLURM_JOB_NAME-$SLURM_JOB_ID" --run.resume "$@" &
step=$!

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal has ended the wait
    wait "$step"
    code=$?
done
if [ "$requeue" = 1 ] && [ "$code" != 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
