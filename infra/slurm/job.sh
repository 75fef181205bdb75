#!/usr/bin/env bash
#SBATCH --job-name=mpc-train-example
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32768M
#SBATCH --time=1440
#SBATCH --output=/shared/jobs/mpc-train-example/log.txt
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
# Starts Ray on every node of this allocation, runs one verb of mpc-cxr on the first, and ends with its exit code.
set -euo pipefail
cd /shared/jobs/mpc-train-example
export AWS_REGION=eu-central-1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# a token for this job alone: other users of the nodes could otherwise reach its ports
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/token"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >token)
trap 'rm -f token' EXIT
rm -f exit_code

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:$((20000 + SLURM_JOB_ID % 10000))"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus=8 --num-gpus=4 --dashboard-host=127.0.0.1 \
  -- env RAY_ADDRESS="$address" python -m infra.submit.run exit_code

# Ray ends well even where it could not start: only the verb itself leaves its exit code
exit "$(cat exit_code)"
