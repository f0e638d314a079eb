"""PPOTrainer.generate: dropout, end-of-sequence tokens, and the reference of a LoRA policy."""

import pytest
import tiny_models
import torch
from tiny_models import steps


def test_generation_runs_without_dropout():
    trainer = tiny_models.trainer(changes={"attn_pdrop": 0.5, "resid_pdrop": 0.5})
    trainer.model.train()
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    first, second = (trainer.generate(queries, batch_size=4, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.model.training, "the mode the user had set comes back"
    steps(trainer)
    assert not trainer.model.training


def test_end_of_sequence_in_the_query_cuts_nothing():
    trainer = tiny_models.trainer()
    query = torch.tensor([5, tiny_models.EOS, 6, 7])
    (whole,) = trainer.generate([query], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(whole[:4], query) and len(whole) == 7


def test_generation_cuts_after_the_first_end_of_sequence():
    trainer = tiny_models.trainer()
    eos = tiny_models.EOS
    rows = torch.tensor([[0, 5, 6, 9, eos, 3, eos], [4, 5, 6, 9, 8, 7, 3]])
    queries = [torch.tensor([5, 6]), torch.tensor([4, 5, 6])]

    def trim(*options):
        return [row.tolist() for row in trainer._trim(rows, queries, 3, *options)]

    assert trim(False, True) == [[9, eos], [9, 8, 7, 3]]
    assert trim(True, True) == [[5, 6, 9, eos], [4, 5, 6, 9, 8, 7, 3]]
    assert trim(False, False) == [[9, eos, 3, eos], [9, 8, 7, 3]]
    with pytest.raises(
        ValueError, match=r"PPOTrainer.generate: query_tensor must be a 1-D tensor .*, got shape \[1, 2\]"
    ):
        trainer.generate(torch.ones(1, 2, dtype=torch.int64))


def test_reference_responses_of_a_lora_policy_come_without_the_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_models.trainer("llama", peft_config=config)
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "batch_size": 4}
    policy, reference = trainer.generate(queries, generate_ref_response=True, **options)
    assert any(not torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    with trainer.model.pretrained_model.disable_adapter():
        without = trainer.generate(queries, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, without, strict=True))
