"""Video codecs and text encoders: the protocols, and the implementations that speak them."""
