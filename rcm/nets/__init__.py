"""Networks: the Wan diffusion transformer, its attention, layouts and cache, and the denoiser that
objectives talk to.
"""
