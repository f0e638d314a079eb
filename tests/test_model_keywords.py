"""Keywords of `from_pretrained` that programs of transformers 4 and TRL's example scripts use."""

import pytest
import tiny_models
import torch

import ppo_ext
from ppo_ext.models import keywords

MODEL = ppo_ext.AutoModelForCausalLMWithValueHead


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.gpt2().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "old",
    [
        {"load_in_8bit": False},
        {"load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_compute_dtype": torch.float16},
        {"use_auth_token": True},
        {"use_auth_token": None},
        {"resume_download": True, "use_flash_attention_2": False},
        {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "trust_remote_code": True},
    ],
    ids=lambda old: ",".join(old),
)
def test_old_keywords_load_the_same_model(folder, old):
    expected, got = MODEL.from_pretrained(folder), MODEL.from_pretrained(folder, **old)
    for name, tensor in expected.pretrained_model.state_dict().items():
        assert torch.equal(tensor, got.pretrained_model.state_dict()[name]), name


@pytest.mark.parametrize(
    "old, new",
    [
        ({"use_auth_token": "secret"}, {"token": "secret"}),
        ({"use_auth_token": False, "token": None}, {"token": False}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"load_in_8bit": False, "device_map": "auto"}, {"device_map": "auto"}),
        ({"revision": "main"}, {"revision": "main"}),
    ],
    ids=lambda keywords: ",".join(keywords),
)
def test_translation(old, new):
    assert keywords.translate(old, "cpu") == new


def test_quantization_flags_become_a_config(monkeypatch):
    monkeypatch.setattr(keywords, "find_spec", lambda name: object())
    got = keywords.translate({"load_in_8bit": True, "llm_int8_threshold": 4.0, "revision": "main"}, 1)
    config = got.pop("quantization_config")
    assert config.load_in_8bit and not config.load_in_4bit and config.llm_int8_threshold == 4.0
    assert got == {"revision": "main", "device_map": {"": 1}}
    assert keywords.translate({"load_in_8bit": True, "device_map": "auto"}, 1)["device_map"] == "auto"


def test_refused_in_one_sentence(folder, monkeypatch):
    with pytest.raises(ValueError, match="use_auth_token must not be given beside token, got 'a' and 'b'"):
        MODEL.from_pretrained(folder, use_auth_token="a", token="b")
    with pytest.raises(ValueError, match="load_in_4bit must not be given beside quantization_config, got both"):
        MODEL.from_pretrained(folder, load_in_4bit=True, quantization_config=object())
    monkeypatch.setattr(keywords, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="bitsandbytes must be installed for load_in_8bit=True: pip install"):
        MODEL.from_pretrained(folder, load_in_8bit=True)
