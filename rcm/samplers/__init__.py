"""Time grids and the update rules that walk along them.

schedule        decreasing times that end at 0
steps           one update from a time to the next, given a velocity
bidirectional   a whole video along a grid
unipc           the same by a multistep predictor and corrector
"""
