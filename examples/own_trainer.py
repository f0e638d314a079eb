"""PPO with ppo_ext's ops under a training loop of one's own: only torch, no download, a few seconds on a CPU.

The policy is a small recurrent language model that this script makes. A response is a row of up to 16 tokens and ends with
token 0; its score is the share of its tokens that are even. A random policy scores about 0.5.
"""

import copy

import torch

import ppo_ext

VOCABULARY, WIDTH, BATCH, TOKENS = 32, 64, 32, 16
UPDATES, EPOCHS = 20, 4
END = 0


class Policy(torch.nn.Module):
    """The logits of each next token [B, T, V] and the value before it [B, T], from tokens [B, T]."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.body = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY)
        self.value_head = torch.nn.Linear(WIDTH, 1)

    def forward(self, tokens):
        hidden, _ = self.body(self.embedding(tokens))
        return self.lm_head(hidden), self.value_head(hidden).squeeze(-1)


@torch.no_grad()
def sample(policy):
    """Inputs and labels [B, T], the labels one token ahead, and the mask [B, T]: 1 up to the first END of each label row."""
    tokens = torch.full((BATCH, 1), END)
    for _ in range(TOKENS):
        logits = policy(tokens)[0][:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ended_before = (labels == END).cumsum(1) - (labels == END).long()
    return inputs, labels, (ended_before == 0).long()


def main():
    torch.manual_seed(0)
    policy = Policy()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for update in range(UPDATES):
        inputs, labels, mask = sample(policy)
        scores = ppo_ext.masked_mean((labels % 2 == 0).float(), mask, axis=1)
        with torch.no_grad():
            logits, values = policy(inputs)
            old_logprobs = ppo_ext.logprobs(logits, labels, mask=mask)
            ref_logprobs = ppo_ext.logprobs(reference(inputs)[0], labels, mask=mask)
        rewards, _, kls = ppo_ext.kl_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef=0.02)
        advantages, returns = ppo_ext.gae(values, rewards, mask, gamma=1.0, lam=0.95)
        advantages = ppo_ext.masked_whiten(advantages, mask)
        for _ in range(EPOCHS):
            logits, vpreds = policy(inputs)
            logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, mask=mask)
            loss, stats = ppo_ext.ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask)
            loss = loss - 0.01 * ppo_ext.masked_mean(entropy, mask)  # keeps the policy from settling too early
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if update % 4 == 0 or update == UPDATES - 1:
            kl = kls.sum(1).mean()
            print(
                f"update {update:2d}  score {scores.mean():.3f}  KL {kl:6.3f}  clipped {stats['policy/clipfrac']:.3f}"
            )


if __name__ == "__main__":
    main()
