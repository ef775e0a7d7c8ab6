"""Layer 1: pure algebra of time, paths and blocks. No networks, no devices, no state."""
