"""Which chunks of the past stay in a cache and where they stand in time: one policy per file, one
protocol (`base`).
"""
