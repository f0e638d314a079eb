"""Which tokens count, their positions, and slicing a rollout."""

import pytest
import tiny_models
import torch

from ppo_ext.trainer.rollout import Rollout, next_tokens, position_ids, takes_position_ids, token_mask

QUERIES, RESPONSES = [3, 5, 4, 6], [4, 6, 2, 5]


def attention(side):
    width = max(q + r for q, r in zip(QUERIES, RESPONSES, strict=True))
    rows = [[1] * (q + r) + [0] * (width - q - r) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    return torch.tensor([row if side == "right" else row[::-1] for row in rows])


def columns(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def test_a_response_fills_the_columns_before_its_tokens():
    mask = token_mask(attention("right"), QUERIES, RESPONSES)
    assert columns(mask) == [[2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [3, 4], [5, 6, 7, 8, 9]]
    assert mask.shape == (4, 11) and mask.dtype == torch.int64 and (mask[:, -1] == 0).all()


def test_left_padding_shifts_the_columns():
    mask = token_mask(attention("left"), QUERIES, RESPONSES)
    assert columns(mask) == [[6, 7, 8, 9], [4, 5, 6, 7, 8, 9], [8, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_response_masks(side):
    masks = [torch.tensor(row) for row in ([1, 0, 0, 1], [0.0, 0.5, 1.0, 0.0, 0.0, 0.0], [False, True], [1] * 5)]
    whole = columns(token_mask(attention(side), QUERIES, RESPONSES))
    mask = token_mask(attention(side), QUERIES, RESPONSES, masks)
    expected = [
        [column for column, keep in zip(row, kept.tolist(), strict=True) if keep]
        for row, kept in zip(whole, masks, strict=True)
    ]
    assert columns(mask) == expected and set(mask.unique().tolist()) == {0, 1}


def test_encoder_decoder_counts_from_the_second_generated_token():
    attention_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert columns(token_mask(attention_mask, [9, 9], [4, 5], is_encoder_decoder=True)) == [[1, 2], [1, 2, 3]]
    masks = [torch.tensor([1, 1, 0, 1]), torch.tensor([1, 1, 1, 0, 1])]
    mask = token_mask(attention_mask, [9, 9], [4, 5], masks, is_encoder_decoder=True)
    assert columns(mask) == [[2], [1, 3]]


def test_next_tokens_and_positions():
    assert next_tokens(torch.tensor([[3, 4, 5]])).tolist() == [[4, 5, 0]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_models_that_take_positions():
    assert takes_position_ids(tiny_models.gpt2()) and takes_position_ids(tiny_models.llama())
    assert not takes_position_ids(tiny_models.t5())
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert takes_position_ids(peft.get_peft_model(tiny_models.llama(), lora))


def test_some_samples_of_a_rollout():
    tokens = [torch.arange(4 * 3).reshape(4, 3) + i for i in range(5)]
    ragged = [torch.ones(i + 1) for i in range(4)]
    rollout = Rollout(ragged, ragged, None, {"input_ids": tokens[0]}, *tokens)
    part = rollout[[2, 0]]
    assert [len(query) for query in part.queries] == [3, 1] and part.response_masks is None
    assert torch.equal(part.returns, tokens[4][[2, 0]]) and torch.equal(
        part.model_inputs["input_ids"], tokens[0][[2, 0]]
    )
