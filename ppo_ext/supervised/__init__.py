"""Supervised fine-tuning and reward models, as thin subclasses of `transformers.Trainer` with the interface of TRL 0.11."""
