"""The import stage: bring the model of a recipe to a plain checkpoint directory, copying only what must be converted.

A local directory and the hub's cache are used where they lie; the artifact keeps their location and hashes. A GGUF
file is dequantized into a checkpoint of its own.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.models import Unigram
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export.checkpoint import finish_config, save_checkpoint
from stillroom.home import offline
from stillroom.models.finite import check_finite
from stillroom.models.load import DTYPES, load_model
from stillroom.models.shape import read_config, stored_dtype
from stillroom.models.source import EMBEDDED, EMBEDDED_ORIGIN, checked_config, model_file_hashes, resolve
from stillroom.recipe import ModelSource
from stillroom.stage import Job, StageResult

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "merges.txt",
    "*.jinja",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
]


def run(job: Job) -> StageResult:
    """Import `job.config` (a ModelSource). Raises InputError for damaged or unsupported models."""
    source: ModelSource = job.config
    found = resolve(source)
    if found.kind == "gguf":
        assert found.path is not None
        convert_gguf(found.path, job.out_dir, source)
        origin = EMBEDDED_ORIGIN if source.source == EMBEDDED else f"dequantized from {found.path.name}"
        return StageResult(details={"origin": origin, "source": source.source})
    if found.path is None:
        job.progress.log(f"fetching {source.source} from the hub, as far as it is not in the local cache")
    model_dir = found.path or fetch(source)
    checked_config(model_dir)
    check_finite(model_dir)
    details = {"origin": source.source, "source": source.source}
    if found.kind == "hub":
        details["revision"] = model_dir.name  # the hub's cache names a snapshot by its commit
    if source.dtype not in ("auto", stored_dtype(read_config(model_dir))):
        save_checkpoint(load_model(model_dir, dtype=DTYPES[source.dtype]), model_dir, job.out_dir)
        return StageResult(details=details)
    return StageResult(location=model_dir, files=model_file_hashes(model_dir), details=details)


def convert_gguf(path: Path, out_dir: Path, source: ModelSource) -> None:
    """Dequantize a GGUF file into a checkpoint directory with its tokenizer and chat template."""
    dtype = DTYPES["bfloat16" if source.dtype == "auto" else source.dtype]
    unreadable = f"{path} is no GGUF file that transformers can convert"
    try:
        model_type = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).model_type
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError) as error:
        raise InputError(f"{unreadable}: {error}") from error
    check_tokenizer(tokenizer, model_type, path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise InputError(f"{unreadable}: {error}") from error
    # transformers reads SmolLM2's eos token from the GGUF as <|im_start|>; the model's own config has the right id
    if isinstance(model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    finish_config(out_dir)
    checked_config(out_dir)
    check_finite(out_dir)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model_type: str, path: Path) -> None:
    """Raise InputError for a Gemma tokenizer that is no byte-pair encoding: up to 5.14 at least, transformers makes
    one of unigrams from the scores in the GGUF file, which are ranks of merges, so that text falls into letters."""
    if model_type.startswith("gemma") and isinstance(tokenizer.backend_tokenizer.model, Unigram):
        raise InputError(
            f"transformers converts the tokenizer in {path} wrongly: text falls into letters, where {model_type} was "
            "trained on words; give the model's safetensors checkpoint, which has a tokenizer.json, as `model`"
        )


def fetch(source: ModelSource) -> Path:
    """The hub model's files in the local cache, downloading what is missing. safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = HUB_FILES + (["*.py"] if source.trust_remote_code else [])
    try:
        return Path(snapshot_download(source.source, revision=source.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(f"{source.source} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{source.source} is not on the hub, or HF_TOKEN does not open it") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if offline() else "the hub cannot be reached"
        raise EnvironmentCannot(
            f"{source.source} is not in the local hub cache and {why}; give a local directory as `model`"
        ) from error
