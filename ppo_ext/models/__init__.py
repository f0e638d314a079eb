"""Value-head models: loading, saving, LoRA, and the frozen reference."""
