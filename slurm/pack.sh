#!/bin/bash
# Packing as an array of independent tasks, from anywhere, with mcf's environment active:
#
#     sbatch --array=0-63 slurm/pack.sh source=LAION/images detections=LAION/detections out=shards/laion
#
# What stands behind the script's name are keys of mcf.pack (python -m mcf.pack --help). Each task packs its share of the
# tars; the last one to end drops duplicates and writes the manifest. A task that fails is simply started again, alone or
# with all (the same command: what is made is kept), and another number of tasks may do the rest.
#SBATCH --job-name=mcf-pack
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS=1 # a process a core; none needs threads of its own
exec python -u -m mcf.pack "$@"
