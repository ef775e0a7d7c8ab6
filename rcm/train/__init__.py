"""Training: state, one step, the loop, optimiser, EMA, checkpoints, export, metrics and
observers.
"""
