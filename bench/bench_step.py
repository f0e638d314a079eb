"""One `PPOTrainer.step`, ours against TRL's: the same GPT-2 with its full vocabulary, batch, scores and seeds.

The first rows time the whole step, including the model's own passes, which is the gain that a user sees with a model of
this size. The following rows split it into the forward passes of policy and reference below the language model's head, the
backward pass below the head, the optimizer, and the rest, which is the head and the loss path. Peak memory is what a step
needs beyond what is held between steps, in buffers of the logits' size. The learning rate is 0, so that every step does
the same work on the same numbers. There is no step in float64 to compare with; the check is that both trainers give the
same statistics. There is no memory floor, but a row of the policy's own passes, one forward and one backward pass below the
head without any trainer, with their peak memory: that of a step cannot be less.
"""

import copy
import dataclasses
import math
import types
import warnings

import torch

from . import cases, timing, trl_baseline
from .suite import OURS, Attempt, Case, Implementation

_STATS = (
    "objective/kl",
    "ppo/mean_non_score_reward",
    "ppo/loss/value",
    "ppo/policy/entropy",
    "ppo/returns/mean",
    "ppo/returns/var",
)
_FORWARD, _BACKWARD = "forward passes below the head", "backward below the head"
_OPTIMIZER, _LOSS_PATH = "optimizer", "head and loss path"
_ALONE = "policy below the head, alone"


def _ours():
    import ppo_ext  # the trainer imports transformers, which the other benchmarks do not need

    return types.SimpleNamespace(
        PPOTrainer=ppo_ext.PPOTrainer,
        PPOConfig=ppo_ext.PPOConfig,
        ValueHeadModel=ppo_ext.AutoModelForCausalLMWithValueHead,
    )


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _make(step, device):
    """The batch, the two backbones, and the initial value head, the same for all implementations."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=step.vocabulary,
        n_positions=step.tokens,
        n_embd=step.hidden,
        n_layer=step.layers,
        n_head=step.heads,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    ids = torch.randint(3, step.vocabulary, (step.batch_size, step.tokens), device=device)
    query = int(step.query * step.tokens)
    return {
        "queries": list(ids[:, :query]),
        "responses": list(ids[:, query:]),
        "scores": list(torch.randn(step.batch_size, device=device)),
        "policy": GPT2LMHeadModel(config),
        "reference": GPT2LMHeadModel(config),
        "v_head": 0.2 * torch.randn(1, step.hidden),
    }


def _trainer(library, inputs):
    model, ref_model = (
        library.ValueHeadModel.from_pretrained(copy.deepcopy(inputs[name])) for name in ("policy", "reference")
    )
    with torch.no_grad():
        model.v_head.summary.weight.copy_(inputs["v_head"])
        model.v_head.summary.bias.zero_()
    size = len(inputs["queries"])
    settings = library.PPOConfig(
        batch_size=size,
        mini_batch_size=size,
        ppo_epochs=1,
        learning_rate=0.0,
        adap_kl_ctrl=False,
        accelerator_kwargs={"cpu": not inputs["queries"][0].is_cuda},
    )
    return library.PPOTrainer(settings, model, ref_model, _tokenizer())


class _Stepper:
    """run(inputs) returns the statistics of one step. The first call for these inputs builds the trainer."""

    def __init__(self, find_library):
        self._find_library, self._trainers = find_library, {}

    def trainer(self, inputs):
        if id(inputs["policy"]) not in self._trainers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._trainers[id(inputs["policy"])] = _trainer(self._find_library(), inputs)
        return self._trainers[id(inputs["policy"])]

    def __call__(self, inputs):
        trainer = self.trainer(inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = trainer.step(inputs["queries"], inputs["responses"], inputs["scores"])
        return [torch.tensor(stats[name], dtype=torch.float64) for name in _STATS]


# ---- where the time goes --------------------------------------------------------------------------------------------


def _watch_backbone(backbone, parts):
    """Times the forward passes, and starts the backward part when the gradient reaches what the head reads.

    The head itself has no hook, which would make our trainer keep to logits.
    """

    def after(module, arguments, output):
        parts.end(_FORWARD)
        hidden = output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: parts.begin(_BACKWARD))

    return [backbone.register_forward_pre_hook(lambda *_: parts.begin(_FORWARD)), backbone.register_forward_hook(after)]


def _timed(function, before, after):
    def timed(*arguments, **options):
        before()
        result = function(*arguments, **options)
        after()
        return result

    return timed


def parts_of(stepper, inputs, device):
    """{part: milliseconds} of one step."""
    trainer, parts = stepper.trainer(inputs), timing.Parts(device)
    accelerator, optimizer = trainer.accelerator, trainer.optimizer
    hooks = [
        hook
        for model in (trainer.model, trainer.ref_model)
        for hook in _watch_backbone(accelerator.unwrap_model(model).pretrained_model.base_model, parts)
    ]
    backward, update = accelerator.backward, optimizer.step
    accelerator.backward = _timed(backward, lambda: None, lambda: parts.end(_BACKWARD))
    optimizer.step = _timed(update, lambda: parts.begin(_OPTIMIZER), lambda: parts.end(_OPTIMIZER))
    try:
        parts.begin("step")
        stepper(inputs)
        parts.end("step")
    finally:
        accelerator.backward, optimizer.step = backward, update
        for hook in hooks:
            hook.remove()
    known = {name: parts.ms[name] for name in (_FORWARD, _BACKWARD, _OPTIMIZER)}
    return {_LOSS_PATH: parts.ms["step"] - sum(known.values()), **known}


def _policy_alone(stepper, inputs):
    """The policy's passes below the head as a training minibatch has them."""
    trainer = stepper.trainer(inputs)
    backbone = trainer.accelerator.unwrap_model(trainer.model).pretrained_model.base_model.eval()
    ids = torch.stack([torch.cat(pair) for pair in zip(inputs["queries"], inputs["responses"])])

    def call():
        hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        hidden.backward(torch.ones_like(hidden))
        backbone.zero_grad(set_to_none=True)

    return call


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """Adds a row for each part of the step, and one for the policy's passes alone."""

    rounds: int = 3

    def more_rows(self, inputs, names, device):
        samples = {name: [] for name in names}
        for _ in range(self.rounds):
            for name in names:
                samples[name].append(parts_of(self.implementations[name].run, inputs, device))
        for part in (_FORWARD, _LOSS_PATH, _BACKWARD, _OPTIMIZER):
            for name, found in samples.items():
                yield self._row(part, name, timing.summary([parts[part] for parts in found]), device)
        alone = _policy_alone(self.implementations[names[0]].run, inputs)
        times = timing.measure({_ALONE: alone}, device, seconds=0, min_rounds=self.rounds)
        row = self._row(_ALONE, "transformers", times[_ALONE], device)
        self._add_memory(row, Attempt(alone, None, ""), device)
        yield row

    def _row(self, part, name, times, device):
        return {
            "pass": f"{self.pass_name}: {part}",
            "implementation": name,
            "version": "",
            "shown": True,
            "error": None,
            "note": "",
            "selected": part == _LOSS_PATH,
            **dataclasses.asdict(self.settings(device)[0]),
            **dataclasses.asdict(times),
        }


def _trl_or_reason():
    try:
        trl_baseline.functions()
    except trl_baseline.Unavailable as error:
        return str(error)
    return Implementation(_Stepper(trl_baseline.functions))


def suite(device, full):
    for step in cases.STEPS if full else cases.STEPS[:1]:
        ours, trl = Implementation(_Stepper(_ours)), _trl_or_reason()
        shape = step.batch_size, step.tokens, step.vocabulary
        yield StepCase(
            "step",
            f"PPOTrainer.step, {step.name}",
            shape,
            torch.float32,
            make=lambda device, step=step: _make(step, device),
            reference=(ours if isinstance(trl, str) else trl).run,
            implementations={OURS: ours, trl_baseline.NAME: trl},
            traffic=None,
            featured=True,
            buffer_bytes=math.prod(shape) * torch.float32.itemsize,
        )
