"""What a user meets first: the command `rcm`, and `rcm.load`."""
