"""`PPOTrainer`. Start with `ppo`, which has `step`; its base classes each hold one theme: `construction`, `forward`,
`rewards`, `generation`, `reporting`, `saving`, `resume`. `base` declares the attributes that they share."""
