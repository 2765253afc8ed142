"""Models and tokenizers from disk: Hugging Face directories and GGUF files, never pickles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonhybrid.errors import ConfigError, UnsupportedModelError, explain
from tritonhybrid.gguf_cache import converted_directory, is_gguf
from tritonhybrid.local_engine import DTYPES


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A directory that transformers can read, and the dtype to read it in.

    Args:
        directory: Holds config.json, safetensors and a tokenizer.
        dtype: Name of a dtype.
        trust_remote_code: Run the Python code that the directory brings along.
    """

    directory: Path
    dtype: str
    trust_remote_code: bool = False

    @classmethod
    def find(
        cls, path: Path, *, dtype: str = "auto", trust_remote_code: bool = False
    ) -> ModelFiles:
        """Look at what ``path`` is; a GGUF file is converted on its first use.

        Args:
            path: A Hugging Face model directory or a GGUF file.
            dtype: float32, bfloat16, float16, or "auto": what the directory's config names,
                bfloat16 for a GGUF file.
            trust_remote_code: See the class.

        Raises:
            ConfigError: There is no such model, or it can't be read.
        """
        if path.is_file():
            if not is_gguf(path):
                raise _refused("a GGUF file begins with the bytes GGUF", path, "other bytes")
            chosen = "bfloat16" if dtype == "auto" else dtype
            return cls(directory=converted_directory(path, chosen), dtype=chosen)
        if not path.is_dir():
            raise _refused("a directory or a GGUF file", path, "nothing at that path")
        config_file = path / "config.json"
        if not config_file.is_file():
            raise _refused("a directory with a config.json", path, "none in it")
        try:
            config = json.loads(config_file.read_text())
        except ValueError as error:
            raise _refused("a config.json that is JSON", path, str(error)) from error
        named = str(config.get("dtype") or config.get("torch_dtype"))
        if dtype == "auto":
            dtype = named if named in DTYPES else "float32"
        return cls(directory=path, dtype=dtype, trust_remote_code=trust_remote_code)

    def load_config(self) -> Any:
        """Read the model's configuration.

        Raises:
            ConfigError: transformers can't read it.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _refused(
                "a config.json of an architecture known here", self.directory, error
            ) from (error)

    def build_empty(self) -> Any:
        """Build the causal language model without weights, on the meta device.

        Raises:
            ConfigError: The configuration can't be read.
            UnsupportedModelError: It is not of a causal language model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self.load_config()
        self._check_causal(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=self.trust_remote_code
            )

    def load_model(self) -> Any:
        """Read the causal language model, weights included, on the CPU.

        Raises:
            ConfigError: The files can't be read.
            UnsupportedModelError: They are not of a causal language model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self._check_causal(self.load_config())
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.directory,
                dtype=getattr(torch, self.dtype),
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _refused(
                "weights as safetensors that fit the config", self.directory, error
            ) from (error)

    def load_tokenizer(self) -> Any:
        """Read the tokenizer.

        Raises:
            ConfigError: The directory has none that can be read.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise _refused("a tokenizer beside the weights", self.directory, error) from error

    def _check_causal(self, config: Any) -> None:
        # Read from the config: transformers puts a new, random head on a model that has none.
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        named = set(config.architectures or [])
        known = {
            name
            for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            for name in ([names] if isinstance(names, str) else names)
        }
        brings_code = self.trust_remote_code and bool(getattr(config, "auto_map", None))
        if not named or named & known or brings_code:
            return
        raise UnsupportedModelError(
            explain(
                "Rollouts need a decoder-only model with a language modelling head",
                expected="a causal language model",
                got=f"{', '.join(sorted(named))} in {self.directory}",
                hint="Choose a model that transformers' AutoModelForCausalLM is meant for.",
            )
        )


def _refused(expected: str, path: Path, got: object) -> ConfigError:
    return ConfigError(
        explain(
            f"--model {path} can't be read",
            expected=expected,
            got=got,
            hint="Pass the directory that save_pretrained wrote, or a GGUF file.",
        )
    )
