"""Command lines that sample: each parses its arguments, opens a checkpoint, and calls one
pipeline.
"""
