"""`PPOTrainer`, one theme a file; `ppo` has `step`."""
