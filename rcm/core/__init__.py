"""Layer 0: errors, random streams, precision, dual numbers. Imports nothing from the package."""
