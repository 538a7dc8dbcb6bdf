"""What losses and evaluation need from a guide, as types.

A loss knows no guide class; a guide that has the members of one of these protocols can be given to
it.
"""
