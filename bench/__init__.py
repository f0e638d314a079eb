"""Microbenchmarks of the ops against TRL's own functions, torch.compile and a memory floor: `python -m bench`."""
