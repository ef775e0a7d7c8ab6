"""The embedded world: videos, codec, captions and scores small enough to train every stage on two
CPU cores.
"""
