"""Parallelism applied to networks from outside: mesh, activation checkpointing, Ulysses, FSDP2, in
the one order of `apply.parallelize`.
"""
