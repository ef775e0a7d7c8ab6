"""Which chunks stay in a cache, and where in time: a policy per file, one protocol (`base`).

sliding_window                      the last blocks, and the first ones as sinks
rolling_sink                        sinks that are the first blocks in turn
infinity_rope                       positions relative to the block being made
deep_forcing, relax_forcing         a budget of chosen tokens or frames (`compressed`)
relax_forcing_paper                 the same by the paper's rule
mem_rope                            running means of what grew old
frames                              what policies share that count frames instead of chunks
"""
