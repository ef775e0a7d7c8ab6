"""Configuration: schema, registries, composition, checks; only command lines import it."""
