"""Launch points: each parses its arguments, composes, and calls one function of the package."""
