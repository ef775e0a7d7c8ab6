"""Weights on disk: containers that are opened and checked whole, and read tensor by tensor."""
