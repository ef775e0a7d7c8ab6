"""A package: the folder `tests` that some installed ones bring along would hide it otherwise."""
