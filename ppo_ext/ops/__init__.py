"""The loss path: one module for each op, the reference that specifies them, and what loads the compiled libraries.

Nothing here imports transformers. Nothing is exported either: `ppo_ext.ops.gae` is the module, not the function.
"""
