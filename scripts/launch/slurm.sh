#!/bin/bash
# sbatch scripts/launch/slurm.sh runs/mine --dataset_name path/to/folder
#
# A run in as many jobs as it needs: five minutes before a job's time is over it saves a checkpoint and ends, and the
# job goes back into the queue, to go on from there. It does the same after a preemption, or when a machine fails. The
# first argument is the output folder, which all machines see; all others are options of scripts/finetune.py. Submit it
# from the repository's root, in the environment that the package is installed in.
#
# Run here: all that follows the #SBATCH lines, with a stand-in for srun and scontrol, on two CPU processes: stopped by
# SIGUSR1, and started once more. Not run: by Slurm itself, on a GPU, or on more than one machine.
#
#SBATCH --job-name=vit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -u
output="$1"
shift

resume=()
if compgen -G "$output/checkpoint-*" > /dev/null; then
    resume=(--resume_from_checkpoint last)
fi

# This shell gets SIGUSR1; srun passes it on to torchrun, and torchrun to the processes that train. srun takes SIGTERM
# itself, and kills them.
requeue=false
trap 'requeue=true; kill -USR1 "$step"' USR1
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # since Slurm 22.05, srun does not take it over from sbatch
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds for the step and its checkpoint, in place of 30

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_endpoint "$(hostname):${PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    scripts/finetune.py --output_dir "$output" "$@" ${resume[@]+"${resume[@]}"} &
step=$!
wait "$step"  # a signal ends the first wait, not the step
status=$?
if "$requeue"; then
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
