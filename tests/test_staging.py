"""Saves are whole: file modes, two writers, what killed saves have left, a full disk, and files that users wrote."""

import errno
import json
import os
import resource
import signal
import threading

import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

from ppo_ext import AutoModelForCausalLMWithValueHead, PPOTrainer
from ppo_ext.models import checkpoint, staging
from ppo_ext.models.staging import staged


@pytest.fixture(scope="module")
def trainer():
    return tiny_models.trainer()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(trainer, tmp_path, umask):
    before = os.umask(umask)
    try:
        trainer.save_pretrained(tmp_path / "model")
        trainer.save_run(tmp_path / "run")
        checkpoint.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert "trainer_state.safetensors" in modes and "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_readme_of_the_user_stays_and_a_first_one_is_written(trainer, tmp_path):
    trainer.save_pretrained(tmp_path)
    assert "fine-tuned with PPO" in (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    trainer.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_save_that_fails_changes_nothing_tokenizer_included(trainer, tmp_path, monkeypatch):
    trainer.save_pretrained(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def fail(*_):
        raise ZeroDivisionError

    for owner, method in ((trainer.tokenizer, "save_pretrained"), (trainer, "create_model_card")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, fail)
            for folder in ("old", "new"):
                with pytest.raises(ZeroDivisionError):
                    trainer.save_pretrained(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert os.listdir(tmp_path) == ["old"]


def test_what_a_killed_save_has_left_is_removed_and_what_another_writes_is_not(tmp_path):
    with staged(tmp_path) as other:
        if (child := os.fork()) == 0:
            with staged(tmp_path):
                os._exit(9)
        os.waitpid(child, 0)
        assert len(os.listdir(tmp_path)) == 2
        checkpoint.write_json(tmp_path / "x.json", {})
        assert os.path.isdir(other) and sorted(os.listdir(tmp_path))[1:] == ["x.json"]
        checkpoint.write_json(f"{other}/y.json", {})
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y.json"]


def test_a_save_that_was_killed_while_its_files_moved_is_finished_by_the_next_reader(trainer, tmp_path):
    trainer.save_pretrained(tmp_path)
    other = tiny_models.trainer(changes={"n_layer": 1})
    other.tokenizer.add_tokens(["w_new"])
    if (child := os.fork()) == 0:
        moved, replace = [], os.replace

        def die_at_the_third(source, target):
            moved.extend([target] * str(source).startswith(f"{tmp_path}/.new-"))
            if len(moved) == 3:
                os._exit(9)
            replace(source, target)

        os.replace = die_at_the_third
        other.save_pretrained(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [name for name in os.listdir(tmp_path) if name.startswith(".new-")]
    again = PPOTrainer.from_pretrained(tmp_path, config=other.config)
    assert len(again.tokenizer) == len(trainer.tokenizer) + 1
    loaded = again.accelerator.unwrap_model(again.model)
    assert all(torch.equal(loaded.get_parameter(name), x) for name, x in tiny_models.weights(other).items())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".new-")]


@pytest.mark.parametrize("writers", [2, 4])
def test_several_writers_of_one_sharded_folder(tmp_path, writers):
    def write(value):
        for _ in range(3):
            with staged(tmp_path) as folder:
                names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
                for n, name in enumerate(names):
                    checkpoint.write_tensors(f"{folder}/{name}", {f"t{n}": torch.full((4,), float(value))})
                index = {"weight_map": {f"t{n}": name for n, name in enumerate(names)}}
                checkpoint.write_json(f"{folder}/model.safetensors.index.json", index)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = checkpoint.weight_files(tmp_path)
    values = {checkpoint.read_tensors(path)[name].unique().item() for name, path in files.items()}
    assert len(files) == 3 and len(values) == 1
    assert len(os.listdir(tmp_path)) == 4, os.listdir(tmp_path)


def test_a_writer_waits_for_the_one_whose_files_move(tmp_path):
    with staging._locked(tmp_path):
        writer = threading.Thread(target=checkpoint.write_json, args=(tmp_path / "x.json", {}))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive() and not (tmp_path / "x.json").exists()
    writer.join()
    assert (tmp_path / "x.json").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(staging.fcntl, "flock", unsupported)
    (tmp_path / (".tmp-" + "0" * 32)).mkdir()
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    assert checkpoint.read_json(tmp_path / "x.json") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == [".tmp-" + "0" * 32, "x.json"]  # perhaps another's: it stays


def save_run(trainer, folder):
    trainer.save_run(folder)


def save_model(trainer, folder):
    trainer.save_pretrained(folder)


def save_in_shards(trainer, folder):
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, max_shard_size="20KB")


def save_tokenizer(trainer, folder):
    with staged(folder) as inside:
        trainer.tokenizer.save_pretrained(inside)


def save_json(trainer, folder):
    checkpoint.write_json(folder / "x.json", {"text": "long" * 1000})


@pytest.mark.parametrize("limit", [0, 700])
@pytest.mark.parametrize("save", [save_run, save_model, save_in_shards, save_tokenizer, save_json])
def test_a_full_disk_is_one_sentence_with_the_folder(trainer, tmp_path, save, limit):
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
    )  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError) as failed:
            save(trainer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, old)
    assert failed.value.errno == errno.EFBIG
    assert f"checkpoint: {tmp_path} must be a folder that can be written to, got File too large" in str(failed.value)
    assert os.listdir(tmp_path) == []


def test_a_running_mean_is_written_whole(trainer, tmp_path):
    trainer.running.save_to_json(tmp_path / "moments.json")
    assert json.loads((tmp_path / "moments.json").read_text())["mean"] == trainer.running.mean
    (tmp_path / "moments.json").write_text("{")
    with pytest.raises(ValueError, match="moments.json must be JSON"):
        type(trainer.running).load_from_json(trainer.accelerator, tmp_path / "moments.json")


def test_what_is_saved_loads_in_transformers_too(trainer, tmp_path):
    trainer.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(trainer.tokenizer)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.get_parameter(name), x) for name, x in tiny_models.weights(trainer).items())
