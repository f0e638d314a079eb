"""TRL 0.11.4's own functions, imported from the installed trl, with the few attributes of a trainer that they read.

Where TRL's classic PPO is not installed, `functions()` raises `Unavailable`, and the rows show the reason.
"""

import functools
import types
import warnings

from .peers import Unavailable

NAME = "TRL 0.11.4"
COMPILED = f"{NAME}, torch.compile"
UPCAST = f"{NAME} on logits.float()"
UPCAST_COMPILED = f"{UPCAST}, torch.compile"
KL_COEF = 0.2


@functools.cache
def functions():
    """TRL 0.11.4's ops and the methods of its PPOTrainer as plain functions."""
    try:
        import trl
    except ImportError as error:
        raise Unavailable("trl is not installed; pip install trl==0.11.4 rich") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl import core
            from trl.trainer.ppo_trainer import PPOTrainer
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"trl {trl.__version__} has no classic PPO; pip install trl==0.11.4 rich") from error
    if not hasattr(PPOTrainer, "loss"):
        raise Unavailable(f"trl {trl.__version__} has no PPOTrainer.loss; pip install trl==0.11.4 rich")
    return types.SimpleNamespace(
        PPOTrainer=PPOTrainer,
        PPOConfig=trl.PPOConfig,
        ValueHeadModel=trl.AutoModelForCausalLMWithValueHead,
        logprobs_from_logits=core.logprobs_from_logits,
        entropy_from_logits=core.entropy_from_logits,
        masked_whiten=core.masked_whiten,
        kl_penalty=functools.partial(PPOTrainer._kl_penalty, _trainer(PPOTrainer, kl_penalty="full")),
        compute_rewards=functools.partial(PPOTrainer.compute_rewards, _trainer(PPOTrainer)),
        compute_advantages=functools.partial(PPOTrainer.compute_advantages, _trainer(PPOTrainer)),
        loss=functools.partial(PPOTrainer.loss, _trainer(PPOTrainer)),
        loss_without_entropy=functools.partial(_without_entropy(PPOTrainer.loss), _trainer(PPOTrainer)),
    )


def _trainer(trainer_class, *, kl_penalty="kl"):
    """The attributes of `self` that the methods read, with TRL's defaults."""
    trainer = types.SimpleNamespace(
        config=types.SimpleNamespace(
            kl_penalty=kl_penalty,
            whiten_rewards=False,
            gamma=1.0,
            lam=0.95,
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            ratio_threshold=10.0,
        ),
        kl_ctl=types.SimpleNamespace(value=KL_COEF),
    )
    trainer._kl_penalty = functools.partial(trainer_class._kl_penalty, trainer)
    return trainer


def _without_entropy(method):
    """TRL's loss without the entropy of the logits, which is timed with `logprobs_and_entropy`: the entropy is its
    argument."""
    return types.FunctionType(
        method.__code__,
        {**method.__globals__, "entropy_from_logits": lambda logits: logits},
        method.__name__,
        method.__defaults__,
    )
