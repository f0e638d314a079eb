"""The three-stage procedure: SFT, a reward model from preferences, PPO against it; see run.py."""
