"""Video codecs and text encoders: the protocols, and the implementations that speak them.

codec                   what is asked of a video codec and of its streams; how frames fold
network_codec           what the two codecs of Wan's latents share
wan_vae                 the codec of Wan's autoencoder: `wan_vae_net` and its `_layers`, memory
                        of a video in `_state`, calls on parts of one in `_stream`, `_tiles` for
                        small cards, `_stages` over several, files in `_weights`, kernels made
                        ready in `_compile`
taehv, taehv_net        the codec of the tiny decoder, for previews

text_protocol           what is asked of a text encoder
umt5                    Wan's: prompts cleaned (`prompt_cleaning`), cut into tokens
                        (`umt5_tokenizer`), looked up (`text_cache`) or encoded (`umt5_weights`)
clip_vision             image features of Wan2.1 image-to-video
published, lazy_module  networks that transformers runs from files with names of their own,
                        read when they are first needed; `text_extra` imports transformers
"""
