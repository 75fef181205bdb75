"""Slurm: a batch script that starts Ray on the nodes of its allocation."""
