"""Time grids and the update rules that walk along them."""
