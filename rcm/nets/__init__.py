"""Networks: the Wan diffusion transformer, its attention, layouts and cache, and the denoiser that
objectives talk to.

What the others ask for, from the outside in:

    velocity_model      what objectives, samplers and rollouts ask of any model
    denoiser            that for a network and its precision; `Guided`, the same with guidance
    condition, layout   what a sample is conditioned on; what the frames of an input are
    wan/                the network: `config`, `block`, `model`; `inputs` are checked, names and
                        files of others in `convert`, `foreign`, `published_config`, variants of a
                        trained network in `lora`, `fp8`, `two_times`

What the network is made of:

    layers, rope, positions     elementwise layers, rotary tables, where tokens stand
    attention                   the choice of a back end, and the one place that carries tangents;
                                the back ends in `attention_dense`, `_auto`, `_flex`, `_packages`
    lora, fp8_linear, frozen_fp8, gan_head      linear layers of another kind, heads beside it

What a causal network remembers, from the outside in:

    paired_cache    the caches of both branches of guidance
    kv_cache        chunks with ids, slots and positions; makes a view for every forward
    kv_view         what that forward sees and writes, as a whole and per layer
    kv_store        where the numbers lie: what is asked of a store, and plain buffers. The other
                    stores are `kv_coded`, blobs of a codec (`kv_codec` says what is asked of one,
                    `kv_memo` keeps what it restored), and `kv_fp8`, attended to in FP8
    kv_rewrite      chunks replaced by others, for policies (`rcm.rollout.eviction`)
"""
