"""PPOConfig.bootstrap_truncated: the value after a response that was cut off."""

import pytest
import tiny_models
import torch

from ppo_ext.trainer import rewards


def batch(name):
    """Four samples, of which the second ends in an end id."""
    queries, responses, scores = tiny_models.batch(4, 3, start_token=tiny_models.PAD if name == "t5" else None)
    responses[1][-1] = tiny_models.EOS
    return queries, responses, scores


def bootstraps(monkeypatch, trainer, *given):
    seen, op = [], rewards.gae
    monkeypatch.setattr(rewards, "gae", lambda *args, **kw: seen.append(kw["bootstrap"]) or op(*args, **kw))
    trainer.step(*given)
    (found,) = seen
    return found


@torch.no_grad()
def value_after(trainer, query, response):
    model = trainer.model.eval()
    if trainer.is_encoder_decoder:
        return model(input_ids=query[None], decoder_input_ids=response[None])[2][0, -1]
    return model(input_ids=torch.cat([query, response])[None])[2][0, -1]


@pytest.mark.parametrize(
    "name, side, settings",
    [
        ("gpt2", "right", {}),
        ("gpt2", "left", {}),
        ("gpt2", "right", {"kl_penalty": "full"}),
        ("llama", "left", {"mini_batch_size": 4}),
        ("t5", "right", {}),
    ],
)
def test_the_value_after_each_response_that_was_cut_off(name, side, settings, monkeypatch):
    trainer = tiny_models.trainer(name, padding_side=side, bootstrap_truncated=True, **settings)
    queries, responses, scores = batch(name)
    expected = [value_after(trainer, *pair) for pair in zip(queries, responses)]
    expected[1] = torch.zeros(())
    found = bootstraps(monkeypatch, trainer, queries, responses, scores)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert (found == 0).tolist() == [False, True, False, False]


def test_the_last_token_that_counts_decides(monkeypatch):
    trainer = tiny_models.trainer(bootstrap_truncated=True)
    queries, responses, scores = batch("gpt2")
    masks = [torch.ones_like(response) for response in responses]
    masks[1][-1] = masks[2][-2:] = 0
    responses[3][-2:] = torch.tensor([tiny_models.EOS, 5])
    masks[3][-1] = 0
    kept = [response[: int(mask.sum())] for response, mask in zip(responses, masks)]
    expected = [value_after(trainer, *pair) for pair in zip(queries, kept)]
    expected[3] = torch.zeros(())
    found = bootstraps(monkeypatch, trainer, queries, responses, scores, masks)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_return_of_the_last_token_goes_on_with_the_bootstrap():
    trainer = tiny_models.trainer(gamma=0.5)
    values, reward, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[1, 1]])
    returns = trainer.compute_advantages(values, reward, mask, bootstrap=torch.tensor([4.0]))[2]
    assert returns[0, 1] == 3.0 + 0.5 * 4.0


def test_every_end_id_of_generation_ends_a_response(monkeypatch):
    trainer = tiny_models.trainer(bootstrap_truncated=True)
    queries, responses, scores = batch("gpt2")
    responses[0][-1] = 7
    trainer.model.pretrained_model.generation_config.eos_token_id = [tiny_models.EOS, 7]
    found = bootstraps(monkeypatch, trainer, queries, responses, scores)
    assert (found == 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["batched_forward_pass", "_forward_pass", "compute_advantages"])
def test_replaced_methods_are_refused(name):
    trainer = tiny_models.trainer(bootstrap_truncated=True)
    shipped, before = getattr(trainer, name), tiny_models.weights(trainer)
    setattr(trainer, name, lambda *args, **kw: shipped(*args, **kw))
    with pytest.raises(ValueError) as error:
        trainer.step(*batch("gpt2"))
    expected = f"PPOTrainer.step: PPOConfig.bootstrap_truncated must be False where {name} is replaced, got True"
    assert str(error.value) == expected
    tiny_models.assert_unmoved(before, trainer)


def test_stop_strings_are_refused():
    trainer = tiny_models.trainer(bootstrap_truncated=True)
    trainer.model.pretrained_model.generation_config.stop_strings = ["w5"]
    with pytest.raises(ValueError, match=r"must be False with the stop_strings \['w5'\] of generation, got True"):
        trainer.step(*batch("gpt2"))
