"""Dense attention of few queries to many keys: parts of the keys beside each other, merged exactly
by their log-sum-exp.
"""
