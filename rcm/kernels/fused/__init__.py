"""The elementwise layers of the transformer, each as one Triton launch: forward, tangent and
gradient (`api.py`), the plain formulas (`reference.py`) and the rule for which of them runs
(`choice.py`).
"""
