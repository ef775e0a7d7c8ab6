"""Configuration: typed schema, registries, composition and checks. Imported by command lines
only.
"""
