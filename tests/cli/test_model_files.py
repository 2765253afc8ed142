import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, LlamaModel, T5Config

from tritonhybrid.commands.generate import encode
from tritonhybrid.errors import ConfigError, UnsupportedModelError
from tritonhybrid.model_files import ModelFiles


def test_a_directory_is_read_in_the_dtype_asked_for(model_dir: Path):
    files = ModelFiles.find(model_dir, dtype="bfloat16")
    model = files.load_model()
    want = LlamaForCausalLM.from_pretrained(model_dir).state_dict()
    assert {name: value.dtype for name, value in model.state_dict().items()} == dict.fromkeys(
        want, torch.bfloat16
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name].bfloat16())


def test_auto_is_the_dtype_that_the_config_names(model_dir: Path, tmp_path: Path):
    assert ModelFiles.find(model_dir).dtype == "float32"
    config = json.loads((model_dir / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelFiles.find(tmp_path).dtype == "bfloat16"


def test_an_empty_model_has_the_shapes_and_no_weights(model_dir: Path):
    model = ModelFiles.find(model_dir).build_empty()
    want = LlamaForCausalLM.from_pretrained(model_dir).state_dict()
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in want.items()
    }
    assert all(parameter.is_meta for parameter in model.parameters())


def test_prompts_are_plain_text_where_there_is_no_chat_template(model_dir: Path):
    tokenizer = ModelFiles.find(model_dir).load_tokenizer()
    assert encode(tokenizer, "w3 w1") == [7, 5]
    with pytest.raises(ConfigError, match="--chat"):
        encode(tokenizer, "w3 w1", chat=True)


def test_a_chat_template_wraps_the_prompt_unless_told_not_to(model_dir: Path):
    tokenizer = ModelFiles.find(model_dir).load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w8{% endif %}"
    )
    assert encode(tokenizer, "w3 w1") == [13, 7, 5, 12]
    assert encode(tokenizer, "w3 w1", chat=False) == [7, 5]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "nothing at that path"),
        (lambda path: path.mkdir(), "config.json"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "the bytes GGUF"),
    ],
    ids=["missing", "empty directory", "another file"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, make, complaint: str):
    make(tmp_path / "model")
    with pytest.raises(ConfigError, match=complaint):
        ModelFiles.find(tmp_path / "model")


def test_a_config_that_is_no_json_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        ModelFiles.find(tmp_path)


def test_an_architecture_that_nobody_knows_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match="abacus"):
        ModelFiles.find(tmp_path).load_config()


def test_weights_that_are_missing_are_refused(model_dir: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match="safetensors"):
        ModelFiles.find(tmp_path).load_model()


def test_pickled_weights_are_not_opened(model_dir: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        ModelFiles.find(tmp_path).load_model()


def test_a_missing_tokenizer_is_refused(tmp_path: Path, model_dir: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises(ConfigError, match="tokenizer"):
        ModelFiles.find(tmp_path).load_tokenizer()


def test_an_encoder_is_refused(tmp_path: Path):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        ModelFiles.find(tmp_path).load_model()


def test_an_encoder_decoder_is_refused(tmp_path: Path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        ModelFiles.find(tmp_path).build_empty()


def test_a_model_without_a_head_is_refused(model_dir: Path, tmp_path: Path):
    LlamaModel(LlamaForCausalLM.from_pretrained(model_dir).config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        ModelFiles.find(tmp_path).load_model()
