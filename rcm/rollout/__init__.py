"""The autoregressive chunk loop, shared by self-forcing training and streaming inference.

plan            what will happen: frames, times and context of every chunk, from host numbers
noise           what it starts from, and what is added
autoregressive  the loop: denoise a chunk against the cache, hand it out, commit its context
eviction/       which chunks a cache keeps, and where they stand in time
replay          a chunk's last step again, with gradient
recipe          how a checkpoint is meant to be sampled, stored beside it; makes plans
"""
