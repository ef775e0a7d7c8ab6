"""Training objectives with state: which networks, which phase, which loss terms. Methods describe;
`rcm.train` executes.
"""
