"""From prompts and files to videos, and back to files."""
