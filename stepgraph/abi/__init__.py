"""Layouts that host and kernels agree on: pure constants, under everything else."""
