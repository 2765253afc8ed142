import os
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tritonhybrid import gguf_cache
from tritonhybrid.errors import ConfigError
from tritonhybrid.model_files import ModelFiles


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tritonhybrid/gguf"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order the rows of q or k as llama.cpp stores them: the halves of each head in turns."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, words: list[str]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(index) for index in range(len(words))])
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(words) - 4)
    )
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    names = {
        "self_attn.q_proj": ("attn_q", config.num_attention_heads),
        "self_attn.k_proj": ("attn_k", config.num_key_value_heads),
        "self_attn.v_proj": ("attn_v", None),
        "self_attn.o_proj": ("attn_output", None),
        "mlp.gate_proj": ("ffn_gate", None),
        "mlp.up_proj": ("ffn_up", None),
        "mlp.down_proj": ("ffn_down", None),
        "input_layernorm": ("attn_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
    }
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for theirs, (ours, num_heads) in names.items():
            weight = layer.get_submodule(theirs).weight
            tensors[f"blk.{index}.{ours}.weight"] = (
                weight if num_heads is None else interleaved(weight, num_heads)
            )
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_it_was_made_of(tmp_path: Path, cache: Path, model_dir: Path):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    words = AutoTokenizer.from_pretrained(model_dir).convert_ids_to_tokens(range(64))
    write_gguf(tmp_path / "tiny.gguf", model, words)
    files = ModelFiles.find(tmp_path / "tiny.gguf", dtype="float32")
    assert files.directory.parent == cache
    converted = files.load_model()
    assert type(converted) is LlamaForCausalLM
    ids = torch.tensor([[1, 9, 17, 33]])
    with torch.no_grad():
        assert torch.allclose(converted(ids).logits, model(ids).logits, atol=1e-5)
    assert files.load_tokenizer().convert_ids_to_tokens([1, 4, 63]) == ["<bos>", "w0", "w59"]


def stub(path: Path) -> Path:
    path.write_bytes(b"GGUF and the rest")
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def convert(path: Path, dtype: str, target: Path) -> None:
        (target / "config.json").write_text(dtype)
        done.append(dtype)

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    return done


def test_a_file_is_converted_once_for_each_dtype(tmp_path: Path, conversions: list[str]):
    path = stub(tmp_path / "a.gguf")
    first = gguf_cache.converted_directory(path, "float32")
    assert gguf_cache.converted_directory(path, "float32") == first
    assert gguf_cache.converted_directory(path, "bfloat16") != first
    assert conversions == ["float32", "bfloat16"]


def test_a_file_that_changed_is_converted_anew(tmp_path: Path, conversions: list[str]):
    path = stub(tmp_path / "a.gguf")
    first = gguf_cache.converted_directory(path, "float32")
    os.utime(path, ns=(0, 0))
    assert gguf_cache.converted_directory(path, "float32") != first
    assert conversions == ["float32", "float32"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_a_conversion_that_was_cut_off_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def convert(path: Path, dtype: str, target: Path) -> None:
        (target / "half").write_text("")
        raise error

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    with pytest.raises(error):
        gguf_cache.converted_directory(stub(tmp_path / "a.gguf"), "float32")
    assert list(cache.iterdir()) == []


def test_a_second_process_that_finished_first_wins(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(path: Path, dtype: str, target: Path) -> None:
        other = cache / target.name.removeprefix(".").rsplit(".", 1)[0]
        other.mkdir()
        (other / "config.json").write_text("the other's")

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    directory = gguf_cache.converted_directory(stub(tmp_path / "a.gguf"), "float32")
    assert (directory / "config.json").read_text() == "the other's"
    assert [path.name for path in cache.iterdir()] == [directory.name]


def test_a_broken_gguf_file_is_refused(tmp_path: Path, cache: Path):
    path = stub(tmp_path / "broken.gguf")
    with pytest.raises(ConfigError, match="broken.gguf can't be converted"):
        ModelFiles.find(path)
    assert list(cache.iterdir()) == []


def test_without_the_gguf_package_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tritonhybrid\[gguf\]"):
        gguf_cache.converted_directory(stub(tmp_path / "a.gguf"), "float32")
