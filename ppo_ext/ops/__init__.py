"""The loss path: one module per op, their specification (`reference`) and the compiled libraries. No transformers here."""
