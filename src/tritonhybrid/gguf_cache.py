"""GGUF files as Hugging Face directories: converted once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from tritonhybrid.errors import ConfigError, explain

logger = logging.getLogger("tritonhybrid")

MAGIC = b"GGUF"


def cache_root() -> Path:
    """Return the directory of converted files: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "tritonhybrid" / "gguf"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def converted_directory(path: Path, dtype: str) -> Path:
    """Convert a GGUF file with transformers' own loader, or find the earlier conversion.

    The weights are dequantised: packed ones can't be trained. The conversion is written under
    a temporary name and renamed when whole, so one that was cut off is never read.

    Args:
        path: The GGUF file.
        dtype: Name of the dtype the weights are stored in.

    Returns:
        A directory with config.json, safetensors and the tokenizer. It is found again by the
        file's path, size, modification time and ``dtype``.

    Raises:
        ConfigError: The gguf package is missing, or transformers can't read the file.
    """
    status = path.stat()
    identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{dtype}"
    directory = cache_root() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if directory.is_dir():
        return directory
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            explain(
                "GGUF files are read with the gguf package",
                expected="gguf to be installed",
                got="no such package",
                hint="pip install 'tritonhybrid[gguf]'.",
            )
        )
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    logger.warning("converting %s to %s in %s; this happens once", path.name, dtype, directory)
    try:
        _convert(path, dtype, scratch)
        try:
            scratch.rename(directory)
        except OSError:
            # Another process was faster; its conversion is of the same bytes.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _convert(path: Path, dtype: str, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        # transformers before 5.23 dequantises always and has no such class.
        gguf_config = getattr(transformers, "GgufConfig", None)
        if gguf_config is not None:
            options["quantization_config"] = gguf_config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=getattr(torch, dtype), **options
        )
    except Exception as error:
        raise ConfigError(
            explain(
                f"{path} can't be converted",
                expected="a GGUF file of an architecture that transformers reads",
                got=f"{type(error).__name__}: {error}",
                hint="Check the download, or pass a Hugging Face model directory.",
            )
        ) from error
    # The record of the packing would make transformers look for packed weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
