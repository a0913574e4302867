"""Where a diffusers pipeline comes from, a folder or the Hugging Face hub; checked before anything large is loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE, GuidanceConfig
from dreamfusion_fast.guidance.models.pipeline_files import TOKENIZER_FILES, content_hash, holds_tokenizer, is_pickle

_EXPECTED = (
    "a folder in diffusers' format holds model_index.json and the folders unet, scheduler, tokenizer, text_encoder "
    "and, for a latent model, vae (SDXL: also tokenizer_2 and text_encoder_2)"
)
# In place of a space; T5's tokenizer knows it without any file.
_SENTENCEPIECE_SPACE = "\u2581"
# Names of tensors that a message holds at most.
_NAMED = 3


def open_source(config: GuidanceConfig) -> PipelineSource:
    """The pipeline a config names.

    Raises:
        UserError: neither a known name, nor a pipeline folder, nor the form of a hub id; or the hub does not have it.
    """
    name = KNOWN_GUIDANCE.get(config.name) or config.name
    path = Path(name).expanduser()
    if path.is_dir():
        return LocalSource(path, config)
    if path.exists():
        raise UserError(f"guidance {config.name!r} is a file, but a pipeline folder is wanted: {_EXPECTED}")
    if re.fullmatch(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", name):
        return HubSource(name, config)
    if "/" in name or "\\" in name or name.startswith((".", "~")):
        raise UserError(f"guidance {config.name!r}: there is no such folder; {_EXPECTED}")
    raise UserError(
        f"unknown guidance {config.name!r}: choose one of {', '.join(KNOWN_GUIDANCE)}, a folder holding a diffusers "
        "pipeline, or a hub id such as owner/name"
    )


class PipelineSource(ABC):
    """Reads configurations and loads components of one pipeline.

    Attributes:
        name: for messages.
        index: the contents of model_index.json.
        revision: commit of the hub's repository; None: a folder.
    """

    revision: str | None = None

    def __init__(self, name: str, config: GuidanceConfig):
        absent = [library for library in ("diffusers", "transformers") if importlib.util.find_spec(library) is None]
        if absent:
            raise UserError(
                f"guidance {name!r} needs {' and '.join(absent)}, not installed here: pip install {' '.join(absent)}"
            )
        self.name = name
        self.variant = config.variant
        # Components whose files carry ".fp16" in their names and nothing else is there.
        self._only_fp16: set[str] = set()
        self._allow_pickle = config.allow_pickle
        self._skeletons: dict[str, torch.nn.Module] = {}
        self.index = self._json("model_index.json")

    def error(self, text: str) -> UserError:
        """The error of what the pipeline is or lacks."""
        return UserError(f"guidance {self.name!r}: {text}")

    @abstractmethod
    def _file(self, relative: str) -> Path:
        """A small file of the pipeline on this machine; raises UserError if there is none."""

    @abstractmethod
    def identity(self, components: list[str]) -> str:
        """A string that changes whenever one of the components changes."""

    @property
    @abstractmethod
    def _location(self) -> dict[str, Any]:
        """The arguments by which `from_pretrained` finds the pipeline."""

    @abstractmethod
    def _files_in(self, component: str) -> list[str] | None:
        """Names of all files in the component's folder; None if nobody can say now."""

    def check_weights(self, component: str) -> None:
        """Raise UserError if the component's weights are known to be missing or only stored as pickles.

        A component with weights of the variant "fp16" alone is loaded from these.
        """
        names = self._files_in(component)
        if names is None:
            return
        found = [name for name in names if name.endswith(".safetensors")]
        pickled = [name for name in names if is_pickle(name)]
        loadable = [*found, *pickled] if self._allow_pickle else found
        if not loadable:
            if pickled:
                raise self.error(
                    f"the weights of {component} are stored as pickles, which can run code on "
                    "loading: convert them to safetensors, or allow pickles if you trust their source"
                )
            kinds = "*.safetensors or pickles" if self._allow_pickle else "*.safetensors"
            raise self.error(f"{component} holds no weights ({kinds})")
        if self.variant is not None:
            if not any(f".{self.variant}" in name for name in loadable):
                refused = any(f".{self.variant}" in name for name in pickled)
                raise self.error(
                    f"{component} holds no weights of the variant {self.variant!r}"
                    f"{' but pickles, which can run code on loading' if refused else ''}: leave guidance variant out, "
                    f"or {'allow pickles if you trust their source' if refused else 'name one that is there'}"
                )
        elif found and all(".fp16" in name for name in found):
            self._only_fp16.add(component)

    def check_tokenizer(self, component: str) -> None:
        """Raise UserError if the files of a tokenizer's vocabulary are known to be missing.

        transformers 5 makes an empty tokenizer then, to which all prompts are the same.
        """
        names = self._files_in(component)
        if names is not None and not holds_tokenizer(names):
            held = f"only {', '.join(names)}" if names else "nothing"
            raise self.error(f"{component} holds {held}, but the files of a tokenizer are wanted: {TOKENIZER_FILES}")

    def _variant(self, component: str) -> str | None:
        return "fp16" if component in self._only_fp16 else self.variant

    def class_name(self, component: str) -> str | None:
        """Class of a component, or None if the pipeline has none of this name."""
        entry = self.index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            return None
        return str(entry[1])

    def require(self, components: list[str]) -> None:
        """Raise UserError unless every component is there."""
        missing = [component for component in components if self.class_name(component) is None]
        if missing:
            kind = self.index.get("_class_name", "a pipeline")
            raise UserError(f"guidance {self.name!r} ({kind}) has no {', '.join(missing)}: {_EXPECTED}")

    def config(self, component: str) -> dict[str, Any]:
        """Configuration of a model or scheduler."""
        return self._json(f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json")

    @property
    def sample_size(self) -> int:
        """Height and width of what the U-Net reads.

        Raises:
            UserError: its configuration has no such number.
        """
        size = self.config("unet").get("sample_size")
        if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if not isinstance(size, int) or size < 1:
            raise self.error(f"the unet's sample_size must be one positive number, got {size!r}")
        return size

    @property
    def image_size(self) -> int:
        """Height and width of the images that the pipeline was trained on, pixels; raises as `sample_size` does."""
        if self.class_name("vae") is None:
            return self.sample_size
        levels = self.config("vae").get("block_out_channels", (64,))
        return self.sample_size * 2 ** (len(levels) - 1)

    def skeleton(self, component: str) -> torch.nn.Module:
        """A model as its configuration describes it, without weights, on torch's meta device. It is made once.

        Raises:
            UserError: no such class, or the configuration does not fit it.
        """
        if component in self._skeletons:
            return self._skeletons[component]
        library, class_name = self.index[component]
        config = self.config(component)
        try:
            model_class = _component_class(library, class_name)
            with torch.device("meta"):
                if library == "diffusers":
                    model = model_class.from_config(config)
                else:
                    model = model_class(model_class.config_class.from_dict(config))
        except Exception as error:  # libraries check configurations with errors of many kinds
            raise self.error(
                f"the configuration of {component} ({class_name}) describes no model: {one_line(error)}"
            ) from error
        self._skeletons[component] = model
        return model

    def parameters(self, component: str) -> int:
        """Number of weights of a model, without loading them; raises UserError as `skeleton` does."""
        return sum(parameter.numel() for parameter in self.skeleton(component).parameters())

    def load(self, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """Load a component by the diffusers or transformers class its pipeline names.

        With a dtype it is a model, and comes frozen and, unless the options say otherwise, on the CPU; without, it is a
        tokenizer. Weights in several files are read file by file. Options go to `from_pretrained` as they are.

        Raises:
            UserError: it cannot be loaded, its weights are pickles and the config does not allow them, or they are not
                all there; for a tokenizer, its vocabulary is not there.
        """
        library, class_name = self.index[component]
        options = {**self._location, "subfolder": component, **options}
        if dtype is not None:
            self.check_weights(component)
            options[_dtype_keyword(library)] = dtype
            options["use_safetensors"] = None if self._allow_pickle else True
            options["variant"] = self._variant(component)
            # Tensors of another shape are to be told like those that are missing, not as an error of each library.
            options["output_loading_info"] = options["ignore_mismatched_sizes"] = True
            if _needs_low_memory_flag(library):
                options["low_cpu_mem_usage"] = True
        try:
            loaded = _component_class(library, class_name).from_pretrained(**options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as above, and files have their own
            raise self.error(f"cannot load {component} ({class_name}): {one_line(error)}") from error
        if dtype is None:
            self._require_words(component, loaded)
            return loaded
        model, report = loaded
        self._require_all_weights(component, report)
        return model.eval().requires_grad_(False)

    def _require_words(self, component: str, tokenizer: Any) -> None:
        """As `check_tokenizer`, for files that nobody could name before, and for what is in them."""
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {_SENTENCEPIECE_SPACE}:
            raise self.error(
                f"{component} ({type(tokenizer).__name__}) knows no words, its vocabulary is "
                f"missing or empty: {TOKENIZER_FILES}"
            )

    def _require_all_weights(self, component: str, report: dict[str, Any]) -> None:
        """Raise UserError if files lacked tensors: a library leaves these random, or on the meta device.

        Args:
            component: for the message.
            report: what `from_pretrained` gives for output_loading_info.
        """
        missing = sorted(report["missing_keys"])
        other = [
            f"{name} {list(found)} in place of {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
        ]
        faults = [
            f"{what} {len(names)} of its tensors ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
            for what, names in (("missing are", missing), ("of another shape are", sorted(other)))
            if names
        ]
        if faults:
            _, class_name = self.index[component]
            raise self.error(
                f"the weights of {component} ({class_name}) are incomplete or another model's: {'; '.join(faults)}"
            )

    def _json(self, relative: str) -> dict[str, Any]:
        try:
            content = json.loads(self._file(relative).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"cannot read {relative}: {one_line(error)}") from error
        if not isinstance(content, dict):
            raise self.error(f"{relative} does not hold a JSON object")
        return content


class LocalSource(PipelineSource):
    """A pipeline in a folder."""

    def __init__(self, folder: Path, config: GuidanceConfig):
        self._folder = folder
        super().__init__(config.name, config)

    @property
    def _location(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self._folder), "local_files_only": True}

    def _file(self, relative: str) -> Path:
        path = self._folder / relative
        if not path.is_file():
            raise self.error(f"no diffusers pipeline, it lacks {relative}: {_EXPECTED}")
        return path

    def _files_in(self, component: str) -> list[str]:
        return sorted(path.name for path in (self._folder / component).glob("*") if path.is_file())

    def check_weights(self, component: str) -> None:
        """See `PipelineSource.check_weights`; all files that an index of weights names must be there."""
        super().check_weights(component)
        folder = self._folder / component
        variant = self._variant(component)
        for index in sorted(folder.glob(f"*.safetensors.index{f'.{variant}' if variant else ''}.json")):
            named = self._json(f"{component}/{index.name}").get("weight_map", {})
            missing = sorted({str(name) for name in named.values() if not (folder / str(name)).is_file()})
            if missing:
                raise self.error(
                    f"{component} is incomplete, {len(missing)} of the files that {index.name} "
                    f"names are not there: {', '.join(missing[:3])}"
                )

    def identity(self, components: list[str]) -> str:
        """See `PipelineSource.identity`: of the contents of all files that may be read, wherever the folder is."""
        digest = hashlib.sha256()
        for component in components:
            for path in sorted((self._folder / component).rglob("*")):
                if path.is_file() and (self._allow_pickle or not is_pickle(path.name)):
                    digest.update(f"{path.relative_to(self._folder).as_posix()}:{content_hash(path)}\n".encode())
        return digest.hexdigest()


class HubSource(PipelineSource):
    """A pipeline on the hub, or in the hub's cache on this machine."""

    def __init__(self, hub_id: str, config: GuidanceConfig):
        self._hub_id = hub_id
        self.revision = config.revision
        self._listing: list[str] | None = None
        super().__init__(hub_id, config)
        # The cached file lies in a folder named after the commit: everything else is taken from the same one.
        self.revision = self._file("model_index.json").parent.name

    @property
    def _location(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": self._hub_id, "revision": self.revision}

    def _file(self, relative: str) -> Path:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self._hub_id, relative, revision=self.revision))
        except errors.GatedRepoError as error:
            raise UserError(
                f"guidance {self.name!r} asks for its licence to be accepted: do so at "
                f"https://huggingface.co/{self._hub_id} and log in with: hf auth login"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"guidance {self.name!r} is neither a folder here nor a model on the hub: {_EXPECTED}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"guidance {self.name!r} has no revision {self.revision!r} on the hub") from error
        except errors.LocalEntryNotFoundError as error:
            raise UserError(self._unreachable()) from error
        except errors.EntryNotFoundError as error:
            raise self.error(f"no diffusers pipeline, it lacks {relative}: {_EXPECTED}") from error
        except Exception as error:  # the hub's HTTP library differs between versions, and so do its errors
            raise UserError(f"{self._unreachable()} ({one_line(error)})") from error

    def _files_in(self, component: str) -> list[str] | None:
        if self._listing is None:
            import huggingface_hub

            try:
                self._listing = list(huggingface_hub.list_repo_files(self._hub_id, revision=self.revision))
            except Exception:  # not reachable now: the files may all be in the cache, and loading them will tell
                self._listing = []
        if not self._listing:
            return None
        folder = f"{component}/"
        return [name.removeprefix(folder) for name in self._listing if name.startswith(folder)]

    def _unreachable(self) -> str:
        return (
            f"guidance {self.name!r} is not a folder here and the hub cannot be reached: check the network, name a "
            "folder that holds a diffusers pipeline, or use guidance embedded"
        )

    def identity(self, components: list[str]) -> str:
        return f"{self._hub_id}@{self.revision}:{','.join(components)}"


def one_line(error: Exception, limit: int = 200) -> str:
    """The first line of an error's message, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _component_class(library: str, class_name: str) -> Any:
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"class of the library {library!r}; only diffusers and transformers are loaded")
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None:
        raise ValueError(f"the installed {library} has no class {class_name}")
    return found


def _transformers_version() -> tuple[int, int]:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return major, minor


def _dtype_keyword(library: str) -> str:
    """transformers renamed the argument in 4.56; diffusers takes the old name in every version."""
    return "dtype" if library == "transformers" and _transformers_version() >= (4, 56) else "torch_dtype"


def _needs_low_memory_flag(library: str) -> bool:
    """Whether weights are only read without a second copy on request: transformers before 5, with accelerate."""
    return (
        library == "transformers"
        and _transformers_version() < (5, 0)
        and importlib.util.find_spec("accelerate") is not None
    )
