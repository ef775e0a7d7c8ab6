"""Quantised keys and values: codes, smoothing and clustered residuals, their restore in one launch,
and the correction of the bias that coded keys cause. `codec.KVCodec` is the interface; README.md
has the arithmetic.
"""
