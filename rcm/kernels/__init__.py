"""Attention structure and kernels (layer 2). Tensors in, tensors out: nothing here knows networks.

    masks               who may attend to whom: a predicate, intervals, a matrix
    flash_jvp/          attention with its tangent, under any mask; also the forward of
    masked_attention/   attention with gradient: its backward is dense rectangles
    split_attention/    dense attention of few queries in parts along the keys
    persistent_attention/   the same by one kernel with equal shares for all processors
    fp8_attention/      attention over keys and values in e4m3, for streams
    fused/              norms, gates, GELU, rotation: value, tangent, gradient
    kv_codec/           keys and values as codes, and back
    vae_window, vae_conv            inputs and convolutions of the video codec; each with a plain
                                    form (`_eager`, `_pack`) and one for cards (`_triton`, `_tma`)
    launching, precompile, cuda_graph, replay       how kernels are launched, compiled ahead,
                                    captured, and spared in recomputation

Every folder has its contract in `api.py` (`kv_codec/codec.py`), a plain form that is the
definition, and kernels that tests compare with it, in Triton's interpreter where there is no card.
"""
