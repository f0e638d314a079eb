"""One `PPOTrainer.step`, ours against TRL's, on the same small GPT-2 with its full vocabulary, batch and scores.

The model's own forward and backward passes are in both times, so this is the gain a user sees with a backbone this
small, and less with a larger one. The learning rate is 0: every step then does the same work on the same numbers. There
is no float64 run of a step; what is checked is that both give the same statistics. No memory floor is meaningful here.
"""

import copy
import types
import warnings

import torch

from . import cases, trl_baseline
from .suite import OURS, Case, Implementation

_STATS = ("objective/kl", "ppo/mean_non_score_reward", "ppo/loss/value", "ppo/policy/entropy", "ppo/returns/mean",
          "ppo/returns/var")
_HIDDEN, _LAYERS, _HEADS = 128, 2, 4


def _ours():
    import ppo_ext  # its trainer imports transformers, which the other benchmarks can do without

    return types.SimpleNamespace(PPOTrainer=ppo_ext.PPOTrainer, PPOConfig=ppo_ext.PPOConfig,
                                 ValueHeadModel=ppo_ext.AutoModelForCausalLMWithValueHead)


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _make(shape, device):
    """The batch, the two backbones, and the first value head, which all implementations start from."""
    from transformers import GPT2Config, GPT2LMHeadModel

    batch_size, tokens, vocabulary = shape
    config = GPT2Config(vocab_size=vocabulary, n_positions=tokens, n_embd=_HIDDEN, n_layer=_LAYERS, n_head=_HEADS,
                        bos_token_id=1, eos_token_id=1, pad_token_id=0)
    ids = torch.randint(3, vocabulary, (batch_size, tokens), device=device)
    return {"queries": list(ids[:, :tokens // 4]), "responses": list(ids[:, tokens // 4:]),
            "scores": list(torch.randn(batch_size, device=device)), "policy": GPT2LMHeadModel(config),
            "reference": GPT2LMHeadModel(config), "v_head": 0.2 * torch.randn(1, _HIDDEN)}


def _trainer(library, inputs):
    model, ref_model = (library.ValueHeadModel.from_pretrained(copy.deepcopy(inputs[name]))
                        for name in ("policy", "reference"))
    with torch.no_grad():
        model.v_head.summary.weight.copy_(inputs["v_head"])
        model.v_head.summary.bias.zero_()
    size = len(inputs["queries"])
    settings = library.PPOConfig(batch_size=size, mini_batch_size=size, ppo_epochs=1, learning_rate=0.0,
                                 adap_kl_ctrl=False, accelerator_kwargs={"cpu": not inputs["queries"][0].is_cuda})
    return library.PPOTrainer(settings, model, ref_model, _tokenizer())


def _stepper(find_library):
    """run(inputs) -> the statistics of one step; the trainer is built on the first call for these inputs."""
    trainers = {}

    def run(inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if id(inputs["policy"]) not in trainers:
                trainers[id(inputs["policy"])] = _trainer(find_library(), inputs)
            stats = trainers[id(inputs["policy"])].step(inputs["queries"], inputs["responses"], inputs["scores"])
        return [torch.tensor(stats[name], dtype=torch.float64) for name in _STATS]

    return run


def _trl_or_reason():
    try:
        trl_baseline.functions()
    except trl_baseline.Unavailable as error:
        return str(error)
    return Implementation(_stepper(trl_baseline.functions))


def suite(device, full):
    shape, ours, trl = cases.STEP, Implementation(_stepper(_ours)), _trl_or_reason()
    yield Case("step", "PPOTrainer.step", shape, torch.float32, make=lambda device: _make(shape, device),
               reference=(ours if isinstance(trl, str) else trl).run,
               implementations={OURS: ours, trl_baseline.NAME: trl}, traffic=None)
