"""Records, shards and their order. Knows neither tokenizers nor text encoders: embeddings are
stored, or encoded by a function it is given.
"""
