"""Stands for the benchmark's own package: workloads of every shape of task, small and random."""
