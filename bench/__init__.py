"""Microbenchmarks of the ops against TRL's own expressions, torch.compile and the memory floor: `python -m bench`."""
