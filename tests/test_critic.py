"""A critic of its own: `PPOTrainer(critic_model=...)`."""

import re

import pytest
import tiny_models
import torch
import transformers
from tiny_models import steps, trainer, weights

import ppo_ext

CausalLM = ppo_ext.AutoModelForCausalLMWithValueHead
KINDS = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "llama": transformers.LlamaForSequenceClassification,
    "llama tokens": transformers.LlamaForTokenClassification,
}


def value_head(name="llama", seed=5):
    model = tiny_models.build(name, seed)
    kind = ppo_ext.AutoModelForSeq2SeqLMWithValueHead if name == "t5" else CausalLM
    return kind.from_pretrained(model)


def classifier(name="llama", seed=5, **changes):
    config = tiny_models.build(name.partition(" ")[0], seed).config
    config.num_labels = 1
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return KINDS[name](config)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def values_alone(model, query, response):
    """The values of the tokens before each response token, of one sample without padding."""
    ids = torch.cat([query, response])[None]
    model.eval()
    with torch.no_grad():
        if hasattr(model, "v_head"):
            values = model(ids)[2]
        else:
            base = getattr(model, model.base_model_prefix)
            values = model.score(base(ids).last_hidden_state).squeeze(-1)
    return values[0, len(query) - 1 : -1]


# ---- the values are the critic's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "make, name", [(value_head, "gpt2"), (value_head, "llama"), (classifier, "gpt2"), *[(classifier, n) for n in KINDS]]
)
def test_values_are_those_of_the_critic(make, name, policy, side, monkeypatch):
    critic = make(name)
    ours = trainer(policy, padding_side=side, critic_model=critic)
    seen = []
    monkeypatch.setattr(ours, "_record", lambda rollout, *_: seen.append(rollout) or {"objective/kl": 0.0})
    queries, responses, scores = tiny_models.batch(4, 3)
    expected = [values_alone(critic, q, r) for q, r in zip(queries, responses)]
    ours.step(queries, responses, scores)
    (rollout,) = seen
    assert ours.why_logits is None
    found = rollout.values[rollout.mask != 0]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_both_models_are_trained_and_the_policys_value_head_is_not_used(full):
    critic = value_head("gpt2")
    ours = trainer(critic_model=critic, **({"kl_penalty": "full"} if full else {}))
    before = weights(ours), state(critic)
    (stats,) = steps(ours)
    head = ours.model.v_head.state_dict()
    assert not any(p.requires_grad for p in ours.model.v_head.parameters())  # DDP would wait for its gradients
    assert len(stats) == 40
    assert all(torch.equal(head[name], before[0][f"v_head.{name}"]) for name in head)
    moved = [name for name, p in weights(ours).items() if not torch.equal(p, before[0][name])]
    assert len(moved) == len(before[0]) - len(head)
    assert all(not torch.equal(now, before[1][name]) for name, now in state(critic).items())


def test_without_logits_the_step_is_that_with_logits():
    found = []
    for full in (False, True):
        ours = trainer(critic_model=value_head(), mini_batch_size=4)
        if full:
            ours.model.register_forward_hook(lambda *_: None)
        steps(ours, 2)
        assert (ours.why_logits is None) != full
        found.append({**weights(ours), **state(ours.critic)})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-5)


def test_the_critic_learns_at_its_own_rate():
    ours = trainer(critic_model=value_head(), learning_rate=1e-3, critic_learning_rate=0.0)
    before, policy = state(ours.critic), weights(ours)
    steps(ours)
    assert same(state(ours.critic), before)
    assert not same(weights(ours), policy)
    assert [group["lr"] for group in ours.optimizer.param_groups] == [1e-3, 0.0]
    assert [g["lr"] for g in trainer(critic_model=value_head()).optimizer.param_groups] == [1e-3, 1e-3]


# ---- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_penalty": "full"}, {"entropy_coef": 0.1, "gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}],
    ids=str,
)
def test_in_the_warm_up_the_policy_stands_still(options):
    def adam(parameters):
        return torch.optim.AdamW([*parameters, *critic.parameters()], lr=1e-3, weight_decay=0.1)

    critic = value_head()
    ours = trainer(critic_model=critic, critic_warmup_steps=2, optimizer=adam, **options)
    before, values, kl_coef = weights(ours), state(ours.critic), ours.kl_ctl.value
    steps(ours, 2)
    assert same(weights(ours), before)
    held = {id(p) for p in ours.critic_params}
    assert {id(p) for p in ours.optimizer.optimizer.state} == held  # no moments of the policy
    assert not same(state(ours.critic), values)
    assert ours.kl_ctl.value == kl_coef
    steps(ours)
    assert not same(weights(ours), before)
    assert ours.kl_ctl.value != kl_coef


def test_the_warm_up_may_begin_again():
    ours = trainer(critic_model=value_head())
    steps(ours)
    ours.config.critic_warmup_steps = 2
    before, critic = weights(ours), state(ours.critic)
    moments = [{k: v.clone() for k, v in ours.optimizer.optimizer.state[p].items()} for p in ours.model_params]
    steps(ours)
    assert same(weights(ours), before) and not same(state(ours.critic), critic)
    for parameter, old in zip(ours.model_params, moments, strict=True):
        assert all(torch.equal(ours.optimizer.optimizer.state[parameter][key], x) for key, x in old.items())


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_that_the_ratio_guard_skips_moves_neither(accumulation):
    ours = trainer(
        critic_model=value_head(), ratio_threshold=1e-6, gradient_accumulation_steps=accumulation, ppo_epochs=1
    )
    before, critic = weights(ours), state(ours.critic)
    with pytest.warns(UserWarning, match="is skipped"):
        steps(ours)
    assert same(weights(ours), before) and same(state(ours.critic), critic)
    assert not ours.optimizer.optimizer.state


@pytest.mark.parametrize("where", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_moves_neither(where):
    ours = trainer(critic_model=value_head())
    model = ours.model if where == "policy" else ours.critic.model
    name = "transformer.h.0.attn.c_attn.weight" if where == "policy" else "model.layers.0.self_attn.q_proj.weight"
    model.pretrained_model.get_parameter(name).register_hook(lambda grad: grad * float("inf"))
    before, critic = weights(ours), state(ours.critic)
    with pytest.raises(ValueError, match="the gradient must be finite.*This update was not made"):
        steps(ours)
    assert same(weights(ours), before) and same(state(ours.critic), critic)


def test_values_that_are_not_finite_are_named():
    ours = trainer(critic_model=value_head())
    with torch.no_grad():
        ours.critic.model.v_head.summary.bias.fill_(float("nan"))
    before = weights(ours)
    with pytest.raises(ValueError, match="NaN or infinite values: the values of the value head"):
        steps(ours)
    assert same(weights(ours), before)


def test_gradients_are_clipped_apart():
    norms = []
    for scale in (1.0, 1e4):
        ours = trainer(critic_model=value_head(), max_grad_norm=0.1, ppo_epochs=1, mini_batch_size=4)
        seen, clip = {}, ours._clip_gradients

        def clipped(ours=ours, seen=seen, clip=clip):
            clip()
            for name, model in (("policy", ours.model), ("critic", ours.critic)):
                grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
                seen[name] = torch.stack(grads).norm().item()

        ours._clip_gradients = clipped
        queries, responses, scores = tiny_models.batch(4, 20)
        ours.step(queries, responses, [scale * score for score in scores])
        norms.append(seen)
    for found in norms:
        assert found["critic"] == pytest.approx(0.1, rel=1e-3)
    # whitened advantages: the policy's gradient does not know how large the critic's is
    assert norms[0]["policy"] == pytest.approx(0.1, rel=1e-3) and norms[1]["policy"] == pytest.approx(0.1, rel=1e-3)


# ---- adapters, checkpointing, encoder-decoders -----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [value_head, classifier])
def test_a_lora_policy_and_gradient_checkpointing(make, checkpointing):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = trainer("llama", peft_config=config, critic_model=make(), gradient_checkpointing=checkpointing)
    before, critic = weights(ours), state(ours.critic)
    (stats,) = steps(ours)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)
    moved = {name for name, p in weights(ours).items() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert not same(state(ours.critic), critic)


def test_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        ours = trainer("llama", critic_model=classifier(), gradient_checkpointing=checkpointing)
        steps(ours)
        found.append({**weights(ours), **state(ours.critic)})
    assert same(*found)


def test_a_critic_of_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    critic = peft.get_peft_model(classifier(), config)
    ours = trainer("llama", critic_model=critic)
    before = state(ours.critic)
    steps(ours)
    moved = {name for name, now in state(ours.critic).items() if not torch.equal(now, before[name])}
    assert {"lora_A" in name or "lora_B" in name or "score" in name for name in moved} == {True}
    assert any("lora_B" in name for name in moved) and any("score" in name for name in moved)


def test_an_encoder_decoder():
    critic = value_head("t5", seed=9)
    ours = trainer("t5", critic_model=critic)
    before = state(critic)
    (stats,) = steps(ours, start_token=tiny_models.PAD)
    assert torch.isfinite(torch.tensor(stats["ppo/loss/value"])) and not same(state(critic), before)


def test_half_precision():
    ours = trainer("llama", critic_model=classifier().to(torch.bfloat16))
    assert ours.critic(**tiny_inputs()).dtype == torch.float32
    steps(ours)


def tiny_inputs():
    ids = torch.tensor([[3, 4, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---- a policy without a value head -----------------------------------------------------------------------------------


def plain(name="llama", critic=None, **config):
    settings = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3, **config}
    critic = value_head(name) if critic is None else critic
    model = tiny_models.build(name)
    return ppo_ext.PPOTrainer(ppo_ext.PPOConfig(**settings), model, None, tiny_models.tokenizer(), critic_model=critic)


def test_a_policy_without_a_value_head_is_trained_generates_and_is_saved_without_one(tmp_path):
    ours = plain()
    queries, _, scores = tiny_models.batch(4, 3)
    responses = ours.generate(queries, return_prompt=False, max_new_tokens=4, do_sample=True, pad_token_id=0)
    ours.step(queries, responses, scores)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    assert same(state(loaded[0]), state(ours.model.pretrained_model))
    again = ppo_ext.PPOTrainer.from_pretrained(tmp_path, config=ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2))
    assert not again._saves_value_head and same(state(again.critic), state(ours.critic))


def test_a_plain_peft_policy(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    settings = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3)
    ours = ppo_ext.PPOTrainer(settings, model, None, tiny_models.tokenizer(), critic_model=classifier())
    steps(ours)
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "critic/model.safetensors").exists()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, name", [(value_head, "llama"), (classifier, "gpt2"), (classifier, "llama tokens")])
def test_the_critic_is_saved_beside_the_policy(make, name, tmp_path):
    ours = trainer(critic_model=make(name))
    steps(ours)
    ours.save_pretrained(tmp_path)
    again = ppo_ext.PPOTrainer.from_pretrained(tmp_path, config=ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2))
    assert type(again.critic.model) is type(ours.critic.model)
    assert same(state(again.critic), state(ours.critic)) and same(weights(again), weights(ours))
    steps(again)


def resumable(make=value_head, **options):
    return trainer("llama", critic_model=make(), critic_warmup_steps=2, critic_learning_rate=3e-3, **options)


@pytest.mark.parametrize("make", [value_head, classifier])
def test_a_resumed_run_has_the_same_bits(make, tmp_path):
    whole = resumable(make)
    steps(whole)
    expected = steps(whole, 3)
    first = resumable(make)
    steps(first)
    first.save_run(tmp_path)
    second = resumable(make)
    steps(second, 3)
    second.load_run(tmp_path)
    assert second.critic_steps == 1
    found = steps(second, 3)
    assert tiny_models.scalars(expected[-1]) == tiny_models.scalars(found[-1])
    assert same(weights(second), weights(whole)) and same(state(second.critic), state(whole.critic))
    for a, b in zip(second._trained_params(), whole._trained_params(), strict=True):
        moments = [ours.optimizer.optimizer.state[p] for ours, p in ((second, a), (whole, b))]
        assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[1])


@pytest.mark.parametrize(
    "other, text",
    [
        (lambda: trainer("llama"), "the critic must be .*, got None"),
        (lambda: trainer("llama", critic_model=classifier()), "the critic.class must be .*ForCausalLMWithValueHead"),
        (lambda: trainer("llama", critic_model=value_head("gpt2")), "the critic.config"),
        (lambda: trainer("llama", critic_model=value_head(), critic_warmup_steps=1), "critic_warmup_steps must be 0"),
    ],
)
def test_another_critic_is_refused(other, text, tmp_path):
    ours = trainer("llama", critic_model=value_head())
    steps(ours)
    ours.save_run(tmp_path)
    with pytest.raises(ValueError, match=text):
        other().load_run(tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------------


def bidirectional():
    config = transformers.BertConfig(
        vocab_size=tiny_models.VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    return transformers.BertForTokenClassification(config)


def pooled():
    config = transformers.BertConfig(
        vocab_size=tiny_models.VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    return transformers.BertForSequenceClassification(config)


def frozen():
    return value_head().requires_grad_(False)


@pytest.mark.parametrize(
    "critic, kind, text",
    [
        (lambda: tiny_models.build("llama"), TypeError, "critic_model must be None, a model with a value head"),
        (lambda: classifier(num_labels=2), TypeError, "with num_labels=1, got LlamaForSequenceClassification"),
        (lambda: "gpt2", TypeError, "critic_model must be None, a model with a value head.*got str"),
        (bidirectional, ValueError, "read no token after the one of the value, got BertForTokenClassification"),
        (pooled, ValueError, "read no token after the one of the value, got BertForSequenceClassification"),
        (frozen, ValueError, "critic_model must have weights that require a gradient, got none"),
        (lambda: value_head("t5"), ValueError, "critic_model must be a decoder-only model as model is, got T5For"),
    ],
)
def test_critics_that_are_refused(critic, kind, text):
    with pytest.raises(kind, match=f"^PPOTrainer: .*{text}"):
        trainer("llama", critic_model=critic())


def test_weights_of_the_policy_are_refused():
    model = value_head()
    with pytest.raises(
        ValueError, match="critic_model must share no trained weights with model or ref_model, got pretrained_model."
    ):
        ppo_ext.PPOTrainer(ppo_ext.PPOConfig(), model, None, tiny_models.tokenizer(), critic_model=model)


def test_an_optimizer_without_the_critic_is_refused():
    with pytest.raises(
        ValueError, match="optimizer must hold weights of critic_model that require a gradient, got Adam"
    ):
        trainer(critic_model=value_head(), optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match="critic_learning_rate must be None with an optimizer.*got 0.01"):
        trainer(critic_model=value_head(), optimizer=torch.optim.Adam, critic_learning_rate=0.01)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("critic_learning_rate", -1.0, "critic_learning_rate must be None or finite and not negative, got -1.0"),
        ("critic_learning_rate", "1", "critic_learning_rate must be a number"),
        ("critic_warmup_steps", -1, "critic_warmup_steps must not be negative, got -1"),
        ("critic_warmup_steps", 1.5, "critic_warmup_steps must be an int"),
    ],
)
def test_settings_out_of_range(name, value, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        ppo_ext.PPOConfig(**{name: value})


def test_settings_without_a_critic_are_refused():
    with pytest.raises(ValueError, match="critic_model must be given with PPOConfig.critic_warmup_steps = 2, got None"):
        trainer(critic_warmup_steps=2)
    ours = trainer()
    ours.config.critic_learning_rate = 0.1
    before = weights(ours)
    with pytest.raises(ValueError, match="critic_model must be given with PPOConfig.critic_learning_rate = 0.1"):
        steps(ours)
    assert same(weights(ours), before)
    with pytest.raises(TypeError, match="model must be a model with a value head"):
        ppo_ext.PPOTrainer(ppo_ext.PPOConfig(), tiny_models.build("llama"), None, tiny_models.tokenizer())
