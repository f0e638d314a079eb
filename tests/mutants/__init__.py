"""Mutation check: each wrong change of `table.py` is made in a copy of the sources, and the tests must see it."""
