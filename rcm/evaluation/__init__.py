"""Measuring and reporting: latency, memory, and the page that a run leaves behind."""
