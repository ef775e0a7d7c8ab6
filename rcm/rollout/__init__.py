"""The autoregressive chunk loop, shared by self-forcing training and streaming inference."""
