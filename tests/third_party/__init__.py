"""LLaMA-Factory's PPO and reward stages on ppo_ext, step by step against the same runs on TRL 0.9.6.

`make third-party` runs it in an environment of its own; the test suite itself needs nothing of this.
"""
