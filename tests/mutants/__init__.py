"""Mutation check: each wrong change in `table.py` is made in a copy of the sources, and a test must fail with it."""
