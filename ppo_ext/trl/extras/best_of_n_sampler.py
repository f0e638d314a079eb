"""`trl.extras.best_of_n_sampler`."""

from typing import TYPE_CHECKING

import torch

from .._names import module_getattr
from ..core import set_seed
from ..models.utils import SUPPORTED_ARCHITECTURES

__all__ = ["BestOfNSampler"]


class BestOfNSampler:
    """Samples `sample_size` responses to each query and keeps the `n_candidates` that score best.

    queries_to_scores: list of texts -> list of numbers. length_sampler: called once per query for max_new_tokens.
    generation_config: handed to the model's `generate`. Source: TRL 0.11.4, `BestOfNSampler`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        queries_to_scores,
        length_sampler,
        sample_size=4,
        seed=None,
        n_candidates=1,
        generation_config=None,
    ):
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            raise TypeError(f"BestOfNSampler: model must be a model with a value head, got {type(model).__name__}")
        if seed is not None:
            set_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self.gen_config = generation_config

    def generate(self, tokenized_query, skip_special_tokens=True, device=None, **generation_kwargs):
        """The best texts for each query.

        tokenized_query: one query as a list of ids or a 1-D tensor, or several as a list of either or a 2-D tensor.
        Returns: for each query a list of n_candidates texts, best first.
        """
        queries = tokenized_query
        if isinstance(queries, torch.Tensor) and queries.dim() == 1 or isinstance(queries[0], int):
            queries = [queries]
        results = []
        for query in queries:
            ids = torch.as_tensor(query).repeat(self.sample_size, 1).to(device)
            samples = self.model.generate(
                ids, max_new_tokens=self.length_sampler(), generation_config=self.gen_config, **generation_kwargs
            ).squeeze()
            texts = self.tokenizer.batch_decode(samples, skip_special_tokens=skip_special_tokens)
            scores = torch.as_tensor(self.queries_to_scores(texts), dtype=torch.float32, device="cpu")
            results.append([texts[i] for i in scores.topk(self.n_candidates).indices])
        return results


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
