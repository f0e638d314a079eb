"""The main demo: PPO makes a pretrained language model continue neutral review openings in a friendly way; see run.py."""
