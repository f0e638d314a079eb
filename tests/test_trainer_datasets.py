"""`trainer.dataloader`: whole batches of every kind of dataset, and what is refused."""

import pytest
import tiny_models
import torch

import ppo_ext

ROWS = [{"input_ids": [3, 4, i + 5], "query": f"w{i}", "junk": i} for i in range(10)]
datasets = pytest.importorskip("datasets")


class TorchDataset(torch.utils.data.Dataset):
    def __init__(self, rows=ROWS):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class TorchStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def rows():
    yield from ROWS


def collate(samples):
    return {name: [sample[name] for sample in samples] for name in samples[0]}


@pytest.fixture(scope="module")
def model():
    return tiny_models.trainer().model


def loaded(model, dataset, **config):
    config = ppo_ext.PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, **config})
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer(), dataset=dataset, data_collator=collate)
    return list(trainer.dataloader)


DATASET = datasets.Dataset.from_list(ROWS)
INDEXED = {
    "datasets": DATASET,
    "datasets of tensors": DATASET.with_format("torch"),
    "torch": TorchDataset(),
    "a part": torch.utils.data.Subset(TorchDataset(), range(9)),
}
STREAMS = {
    "of a dataset": DATASET.to_iterable_dataset,
    "of tensors": lambda: DATASET.to_iterable_dataset().with_format("torch"),
    "of a generator, its columns unknown": lambda: datasets.IterableDataset.from_generator(rows),
    "of torch": TorchStream,
    "shuffled by itself": lambda: DATASET.to_iterable_dataset().shuffle(seed=0, buffer_size=1),
}


@pytest.mark.parametrize("name", INDEXED)
def test_shuffled_whole_batches(model, name):
    batches = loaded(model, INDEXED[name])
    queries = [query for batch in batches for query in batch["query"]]
    assert [len(batch["query"]) for batch in batches] == [4, 4] and len(set(queries)) == 8
    assert queries != [row["query"] for row in ROWS[:8]]
    assert ("junk" in batches[0]) == (not name.startswith("datasets"))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_keeps_its_order(model, name):
    batches = loaded(model, STREAMS[name]())
    assert [batch["query"] for batch in batches] == [[f"w{i}" for i in range(4)], [f"w{i}" for i in range(4, 8)]]
    assert [list(ids) for ids in batches[0]["input_ids"]] == [row["input_ids"] for row in ROWS[:4]]


def test_one_batch_is_enough(model):
    assert len(loaded(model, TorchDataset(ROWS[:4]))) == 1


@pytest.mark.parametrize(
    "dataset, kind, text",
    [
        (DATASET.select(range(3)), ValueError, "processes = 4 \\* 1 samples, one whole batch each, got 3"),
        (TorchDataset(ROWS[:1]), ValueError, "processes = 4 \\* 1 samples, one whole batch each, got 1"),
        (DATASET.select([]), ValueError, "processes = 4 \\* 1 samples, one whole batch each, got 0"),
        (datasets.DatasetDict(train=DATASET, test=DATASET), TypeError,
         r"dataset must be one split, such as dataset\['train'\], got DatasetDict with \['train', 'test'\]"),
        (datasets.IterableDatasetDict(eval=DATASET.to_iterable_dataset()), TypeError,
         r"dataset must be one split, such as dataset\['eval'\], got IterableDatasetDict"),
        ({"train": DATASET}, TypeError, r"dataset must be one split, such as dataset\['train'\], got dict"),
        (ROWS, TypeError, "dataset must be a torch or datasets Dataset, got list"),
        ("imdb", TypeError, "dataset must be a torch or datasets Dataset, got str"),
    ],
)  # fmt: skip
def test_rejects(model, dataset, kind, text):
    with pytest.raises(kind, match=text):
        loaded(model, dataset)
