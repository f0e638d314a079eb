"""What every architecture must do in the trainer. A check returns nothing, or raises; CHECKS is the list of them."""

import copy
import tempfile
import warnings

import torch
from peft import LoraConfig

import ppo_ext
from tests import tiny_models

from .tiny import EOS, LAYERS, PAD, SEQ2SEQ, VOCAB

CHECKS = {}
SIZE = 4  # samples in a batch
# peft refuses adapters on these layers of these models, which run past the layers' own forward
_MAMBAS, _PAST_FORWARD = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d")


def check(function):
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


class Subject:
    """One tiny model, of which each check gets copies."""

    def __init__(self, base, kind):
        self.base, self.kind = base, kind

    def wrapped(self, dtype=torch.float32, **options):
        kinds = ppo_ext.AutoModelForCausalLMWithValueHead, ppo_ext.AutoModelForSeq2SeqLMWithValueHead
        torch.manual_seed(1)
        return kinds[self.kind == SEQ2SEQ].from_pretrained(copy.deepcopy(self.base).to(dtype), **options)

    def trainer(self, model=None, padding_side="right", options=None, **config):
        torch.manual_seed(2)
        settings = {"batch_size": SIZE, "mini_batch_size": SIZE, "ppo_epochs": 1, "learning_rate": 1e-2, **config}
        return ppo_ext.PPOTrainer(
            ppo_ext.PPOConfig(**settings),
            self.wrapped() if model is None else model,
            None,
            tiny_models.tokenizer(padding_side),
            **(options or {}),
        )

    def batch(self):
        return tiny_models.batch(SIZE, 3, start_token=PAD if self.kind == SEQ2SEQ else None)

    def outputs(self, model):
        """Logits and values of one batch without padding."""
        ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
        decoder = {"decoder_input_ids": ids} if self.kind == SEQ2SEQ else {}
        with torch.no_grad():
            logits, _, values = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
        return logits, values


def _unmoved(before, model):
    return [name for name, x in model.named_parameters() if x.requires_grad and torch.equal(x, before[name])]


def _without_gradient(subject, model):
    """The weights to which plain autograd gives no gradient either, such as positions that no sample reaches."""
    model.zero_grad()
    model.eval()
    queries, responses, _ = subject.batch()
    for query, response in zip(queries, responses):
        if subject.kind == SEQ2SEQ:
            logits, _, values = model(input_ids=query[None], decoder_input_ids=response[None])
        else:
            logits, _, values = model(input_ids=torch.cat([query, response])[None])
        (logits.float().log_softmax(-1)[..., 3].sum() + values.sum()).backward()
    found = {name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()}
    model.zero_grad()
    return found


def _assert_at_reference(stats):
    """The policy has computed the first step's log-probabilities as its reference has, so not even rounding differs."""
    kl = float(stats["objective/kl"])
    assert abs(kl) < 1e-6, f"the first step's KL is {kl:.3g}"


def _step(trainer, subject):
    """One step. The KL to the reference must be 0, and every trainable weight must move that autograd reaches."""
    still = _without_gradient(subject, trainer.model)
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    stats = trainer.step(*subject.batch())
    _assert_at_reference(stats)
    unmoved = [name for name in _unmoved(before, trainer.model) if name not in still]
    assert not unmoved, f"{len(unmoved)} weights do not move, {unmoved[0]} first"
    return stats


def _on_pads(subject, padding_side, dtype=torch.float64, limit=1e-6):
    trainer = subject.trainer(subject.wrapped(dtype), padding_side)
    queries, responses, _ = subject.batch()

    def passed(rows):
        inputs = trainer.prepare_model_inputs(queries[rows], responses[rows])
        with torch.no_grad():
            logprobs, _, values, mask = trainer.batched_forward_pass(
                trainer.model, queries[rows], responses[rows], inputs
            )
        return [(x[m != 0], y[m != 0]) for x, y, m in zip(logprobs, values, mask)]

    gaps = []
    for i, together in enumerate(passed(slice(None))):
        [alone] = passed(slice(i, i + 1))
        gaps += [(x - y).abs().max() for x, y in zip(together, alone)]
    worst = float(torch.stack(gaps).max())  # NaN if any is
    if worst != worst and dtype == torch.float64:
        # transformers' mask of padding is NaN in float64 for models without scaled_dot_product_attention
        _on_pads(subject, padding_side, torch.float32, 1e-4)
    else:
        assert worst < limit, f"{worst:.2g} off the sample alone"


@check
def right_pads(subject):
    _on_pads(subject, "right")


@check
def left_pads(subject):
    _on_pads(subject, "left")


@check
def step(subject):
    _step(subject.trainer(), subject)


@check
def generation(subject):
    # in float32: transformers' mask of padding is NaN in float64 for models without scaled_dot_product_attention
    trainer = subject.trainer()
    queries, _, _ = subject.batch()
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": EOS}
    together = trainer.generate(list(queries), return_prompt=False, batch_size=SIZE, **options)
    for query, response in zip(queries, together):
        alone = trainer.generate(query, return_prompt=False, **options)[0]
        assert alone[: len(response)].tolist() == response.tolist(), f"{response.tolist()}, alone {alone.tolist()}"


@check
def save(subject):
    model = subject.wrapped()
    again = _reloaded(model)
    if not _same_weights(model, again):
        plain = _same_weights(subject.base, _reloaded(subject.base))
        raise AssertionError(f"the reloaded model has other weights{'' if plain else ', as by transformers alone'}")
    for a, b in zip(subject.outputs(model), subject.outputs(again)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # products round by where weights lie in memory


def _same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, experts_implementation="eager")  # as tiny.build does


@check
def lora(subject):
    excluded = rf".*\.({'|'.join(_PAST_FORWARD)})" if subject.base.config.model_type in _MAMBAS else None
    peft_config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded, init_lora_weights=True)
    trainer = subject.trainer(subject.wrapped(peft_config=peft_config))
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    stats = trainer.step(*subject.batch())
    _assert_at_reference(stats)
    moved = [name for name, x in trainer.model.named_parameters() if not torch.equal(x, before[name])]
    assert any("lora_B" in name for name in moved), "no adapter weight moves"
    assert all("lora_" in name or "v_head" in name for name in moved), "a frozen weight moves"


@check
def checkpointing(subject):
    changes = []
    for recompute in (False, True):
        model = subject.wrapped()
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the changes are the gradients
        subject.trainer(model, options={"optimizer": optimizer}, gradient_checkpointing=recompute).step(
            *subject.batch()
        )
        changes.append({name: x.detach() - before[name] for name, x in model.named_parameters()})
    largest = max(float(change.abs().max()) for change in changes[0].values())
    assert largest > 0, "no weight moves"
    for name, change in changes[0].items():
        gap = float((change - changes[1][name]).abs().max()) / largest
        assert gap < 1e-5, f"the gradient of {name} is {gap:.2g} of the largest one off"


@check
def shared_layers(subject):
    trainer = subject.trainer(options={"num_shared_layers": LAYERS - 1})
    frozen = {name: x.detach().clone() for name, x in trainer.model.named_parameters() if not x.requires_grad}
    assert frozen, "nothing is shared"
    _step(trainer, subject)
    for name, x in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(x, frozen[name]), f"the shared weight {name} moves"


@check
def bf16(subject):
    stats = subject.trainer(subject.wrapped(torch.bfloat16)).step(*subject.batch())
    _assert_at_reference(stats)
    assert torch.isfinite(torch.tensor(float(stats["ppo/loss/total"]))), "the loss is not finite"


def run(subject, names=tuple(CHECKS)):
    """{check: "ok", or one sentence of what failed}."""
    found = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                CHECKS[name](subject)
                found[name] = "ok"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300].removeprefix("AssertionError: ")
    return found
