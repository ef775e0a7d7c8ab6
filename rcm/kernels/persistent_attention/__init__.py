"""Dense attention without gradient on Hopper: as many programs as processors, with equal shares of
the work.
"""
