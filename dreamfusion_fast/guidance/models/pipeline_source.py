"""The parts of a diffusers pipeline, wherever it is: checked before anything large is loaded, then loaded."""

from __future__ import annotations

import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models import pipeline_classes
from dreamfusion_fast.guidance.models.additions import Additions
from dreamfusion_fast.guidance.models.pipeline_files import (
    TOKENIZER_FILES,
    TOKENIZER_SETTINGS,
    holds_tokenizer,
    is_pickle,
    read_json,
    staged,
    tokenizer_files,
    weights_file,
)

_log = logging.getLogger(__name__)

EXPECTED = (
    "a folder in diffusers' format holds model_index.json and the folders unet or transformer, scheduler, tokenizer, "
    "text_encoder and, for a latent model, vae (SDXL, Stable Diffusion 3 and FLUX: also tokenizer_2 and text_encoder_2)"
)
# In place of a space; T5's tokenizer knows it without any file.
_SENTENCEPIECE_SPACE = "\u2581"
# Names of tensors that a message holds at most.
_NAMED = 3
# Height and width of a model's input, far above any published one's.
_LARGEST_SAMPLE = 4096
_FLUX_SAMPLE = 128
# Weights that a configuration may describe and files lack before memory is taken for them: what lacks is said by name.
_LACKING = 10**7


class PipelineSource(ABC):
    """Reads configurations and loads components of one pipeline.

    Attributes:
        name: for messages.
        index_file: what is read first.
        index: its contents.
        additions: what is added to the components as they are loaded.
        kind: the class of the pipeline, for messages.
        revision: commit of the hub's repository, or "owner/name@commit" where several hold it; None: a folder.
    """

    index_file = "model_index.json"
    revision: str | None = None

    def __init__(self, name: str, config: GuidanceConfig):
        absent = [library for library in ("diffusers", "transformers") if importlib.util.find_spec(library) is None]
        if absent:
            raise UserError(
                f"guidance {name!r} needs {' and '.join(absent)}, not installed here: pip install {' '.join(absent)}"
            )
        self.name = name
        self.variant = config.variant
        self._allow_pickle = config.allow_pickle
        self._skeletons: dict[str, torch.nn.Module] = {}
        self.additions = Additions()
        self._find()
        self.index = self._read_index()
        kind = self.index.get("_class_name", "a pipeline")
        if not isinstance(kind, str):
            raise self.error(f"it is of class {kind!r}, which is code of its own and is not run; {EXPECTED}")
        self.kind = one_line(kind, 60)

    def error(self, text: str) -> UserError:
        """The error of what the pipeline is or lacks."""
        return UserError(one_line(f"guidance {self.name!r}: {text}", 1000))

    @contextmanager
    def faults(self, what: str) -> Iterator[None]:
        """Turn errors in the block into the pipeline's own: libraries raise many kinds for unexpected input."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self.error(f"{what}: {one_line(error)}") from error

    def _read_index(self) -> dict[str, Any]:
        return self._json(self.index_file)

    def _place(self, relative: str) -> str:
        """Where a file or folder of the pipeline is, by its place in a whole pipeline."""
        return relative

    @abstractmethod
    def _file(self, relative: str) -> Path:
        """A small file of the pipeline on this machine; raises UserError if there is none."""

    def identity(self, components: list[str]) -> str:
        """A string that changes whenever one of the components changes."""
        return self._identity(components) + self.additions.identity(components)

    @abstractmethod
    def _identity(self, components: list[str]) -> str:
        """The same of their files."""

    def _find(self) -> None:
        """Settle where the pipeline is, and its revision; called before anything of it is read."""
        self.revision = None

    @abstractmethod
    def _files_in(self, component: str) -> list[str] | None:
        """Names of all files in the component's folder, "" for the pipeline's; None if nobody can say now."""

    def check_weights(self, component: str) -> None:
        """Raise UserError if the component's weights are known to be missing or only stored as pickles."""
        names = self._files_in(component)
        if names is not None:
            self._weights(component, names)

    def _weights(self, component: str, names: list[str]) -> dict[str, Any]:
        """The files of a model's weights, as `staged` takes them, but for their names in place of paths.

        A component with weights of the variant "fp16" alone is loaded from these. An index of several files is checked,
        and is the one that a library reads.
        """
        library, _ = self._class(component)
        for pickled in (False, True)[: 1 + self._allow_pickle]:
            for variant in (None, "fp16") if self.variant is None else (self.variant,):
                found = weights_file(names, library, variant, pickled)
                if found is not None:
                    name, plain = found
                    return self._shards(component, name, plain, names) if name.endswith(".json") else {plain: name}
        raise self.error(self._no_weights(component, names))

    def _no_weights(self, component: str, names: list[str]) -> str:
        pickled = [name for name in names if is_pickle(name)]
        if self.variant is not None:
            refused = not self._allow_pickle and any(f".{self.variant}" in name for name in pickled)
            return (
                f"{component} holds no weights of the variant {self.variant!r}"
                f"{' but pickles, which can run code on loading' if refused else ''}: leave guidance variant out, "
                f"or {'allow pickles if you trust their source' if refused else 'name one that is there'}"
            )
        if pickled and not self._allow_pickle:
            return (
                f"the weights of {component} are stored as pickles, which can run code on "
                "loading: convert them to safetensors, or allow pickles if you trust their source"
            )
        return f"{component} holds no weights ({'*.safetensors or pickles' if self._allow_pickle else '*.safetensors'})"

    def _shards(self, component: str, index: str, plain: str, names: list[str]) -> dict[str, Any]:
        """As `_weights`, of the files that an index names: plain names of files of one kind, all of them there."""
        ending = "." + plain.removesuffix(".index.json").rpartition(".")[2]
        named = self._json(f"{component}/{index}").get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise self.error(f"{component}/{index} holds no weight_map of tensors to names of files")
        shards = sorted(set(named.values()))
        for name in shards:
            if "/" in name or "\\" in name or not name.endswith(ending):
                raise self.error(f"{component}/{index} names the file {name!r}, wanted are names that end in {ending}")
        if missing := [name for name in shards if name not in names]:
            raise self.error(
                f"{component} is incomplete, {len(missing)} of the files that {index} "
                f"names are not there: {', '.join(missing[:3])}"
            )
        return {plain: {"metadata": {"total_size": 0}, "weight_map": named}, **{name: name for name in shards}}

    def check_tokenizer(self, component: str) -> None:
        """Raise UserError if the files of a tokenizer's vocabulary are known to be missing.

        transformers 5 makes an empty tokenizer then, to which all prompts are the same.
        """
        names = self._files_in(component)
        if names is not None and not holds_tokenizer(names):
            held = f"only {', '.join(names)}" if names else "nothing"
            raise self.error(f"{component} holds {held}, but the files of a tokenizer are wanted: {TOKENIZER_FILES}")

    def class_name(self, component: str) -> str | None:
        """Class of a component, or None if the pipeline has none of this name."""
        entry = self.index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            return None
        return str(entry[1])

    def _class(self, component: str) -> tuple[str, str]:
        """Library and class of a component; raises UserError for one that is not served, see `pipeline_classes`."""
        class_name, library = self.class_name(component), str((self.index.get(component) or [None])[0])
        if class_name is None:
            raise self.error(f"{self.kind} has no {component}: {EXPECTED}")
        try:
            pipeline_classes.check_class(component, library, class_name)
        except ValueError as error:
            raise self.error(str(error)) from error
        return library, class_name

    def require(self, components: list[str]) -> None:
        """Raise UserError unless every component is there, of a class that is served."""
        missing = [component for component in components if self.class_name(component) is None]
        if missing:
            raise UserError(f"guidance {self.name!r} ({self.kind}) has no {', '.join(missing)}: {EXPECTED}")
        for component in components:
            self._class(component)

    def warn_of_adapters(self) -> None:
        """Say which LoRA and other adapters lie in the pipeline: they are not applied."""
        for component in ("", "unet", "transformer", "text_encoder", "text_encoder_2"):
            for name in self._files_in(component) or ():
                if "lora" in name.lower() or name.startswith("adapter_"):
                    where = f"{component}/{name}" if component else name
                    _log.warning(one_line(f"guidance {self.name!r}: {where} is ignored, adapters are not applied"))

    @property
    def files(self) -> dict[str, str]:
        """sha256 of files that are not part of a folder or repository, by their paths."""
        return self.additions.files

    def open_additions(self, config: GuidanceConfig) -> None:
        """Read and check what a config adds to the pipeline; raises as `Additions.open` does."""
        components = [component for component in self.index if self.class_name(component) is not None]
        self.additions = Additions.open(config, components, self.skeleton)

    def config(self, component: str) -> dict[str, Any]:
        """Configuration of a model or scheduler; raises UserError for a number that no size of one is."""
        relative = f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"
        content = self._json(relative)
        try:
            pipeline_classes.check_numbers(content)
        except ValueError as error:
            raise self.error(f"{relative}: {error}") from error
        return content

    def number(self, config: dict[str, Any], field: str, default: float) -> float:
        """A finite number of an autoencoder's configuration; the default where it is null or not there.

        Raises:
            UserError: it is something else.
        """
        value = config.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"the vae's {field} must be a number, got {value!r}")
        return float(value)

    @property
    def sample_size(self) -> int:
        """Height and width of what the U-Net or transformer reads.

        Raises:
            UserError: its configuration has no such number.
        """
        part = "transformer" if self.class_name("unet") is None else "unet"
        # FLUX's configuration has none, and its pipeline takes this one.
        usual = _FLUX_SAMPLE if self.class_name(part) == "FluxTransformer2DModel" else None
        size = self.config(part).get("sample_size", usual)
        if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _LARGEST_SAMPLE:
            raise self.error(
                f"the {part}'s sample_size must be one positive number up to {_LARGEST_SAMPLE}, got {size!r}"
            )
        return size

    @property
    def image_size(self) -> int:
        """Height and width of the images that the pipeline was trained on, pixels; raises as `sample_size` does."""
        if self.class_name("vae") is None:
            return self.sample_size
        levels = self.config("vae").get("block_out_channels", (64,))
        if not isinstance(levels, (list, tuple)) or not 1 <= len(levels) <= 8:
            raise self.error(f"the vae's block_out_channels must be a list of 1 to 8 numbers, got {levels!r}")
        return self.sample_size * 2 ** (len(levels) - 1)

    def skeleton(self, component: str) -> torch.nn.Module:
        """A model as its configuration describes it, without weights, on torch's meta device. It is made once.

        Raises:
            UserError: no such class, or the configuration does not fit it.
        """
        if component in self._skeletons:
            return self._skeletons[component]
        library, class_name = self._class(component)
        with self.faults(f"the configuration of {component} ({class_name}) describes no model"):
            model_class = pipeline_classes.component_class(component, library, class_name)
            settings = pipeline_classes.model_settings(model_class, library, self.config(component))
            model = pipeline_classes.skeleton(model_class, library, settings)
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
        library, class_name = self._class(component)
        with self.faults(f"cannot load {component} ({class_name})"):
            names = self._names(component)
            model_class = pipeline_classes.component_class(component, library, class_name)
            if dtype is None:
                with staged(self._tokenizer_files(component, names)) as folder:
                    tokenizer = model_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                self._require_words(component, tokenizer)
                self.additions.apply_to_tokenizer(component, tokenizer)
                return tokenizer
            files = self._model_files(component, names, model_class)
            options["dtype" if library == "transformers" else "torch_dtype"] = dtype
            options["use_safetensors"] = None if self._allow_pickle else True
            # Tensors of another shape are to be told like those that are missing, not as an error of each library.
            options["output_loading_info"] = options["ignore_mismatched_sizes"] = True
            if library == "transformers":  # diffusers runs no code of a model's folder and knows no such option
                options["trust_remote_code"] = False
            if _needs_low_memory_flag(library):
                options["low_cpu_mem_usage"] = True
            with staged(files) as folder:
                model, report = model_class.from_pretrained(folder, local_files_only=True, **options)
        self._require_all_weights(component, report)
        with self.faults(f"cannot add to {component}"):
            self.additions.apply(component, model, quantized="quantization_config" in options)
        return model.eval().requires_grad_(False)

    def _names(self, component: str) -> list[str]:
        """As `_files_in`; raises UserError if nobody can say."""
        names = self._files_in(component)
        if names is None:
            raise self.error(f"cannot tell which files {component} has")
        return names

    def _tokenizer_files(self, component: str, names: list[str]) -> dict[str, Path | dict[str, Any]]:
        """As `staged` takes them, the settings without what names files or code."""
        files: dict[str, Path | dict[str, Any]] = {
            name: self._file(f"{component}/{name}") for name in tokenizer_files(names)
        }
        for name in TOKENIZER_SETTINGS:
            if name in names:
                files[name] = pipeline_classes.tokenizer_settings(self._json(f"{component}/{name}"))
        return files

    def _model_files(self, component: str, names: list[str], model_class: Any) -> dict[str, Path | dict[str, Any]]:
        """As `staged` takes them; raises UserError if the weights do not come near what is described."""
        library, _ = self._class(component)
        files = {
            name: self._file(f"{component}/{file}") if isinstance(file, str) else file
            for name, file in self._weights(component, names).items()
        }
        held = sum(file.stat().st_size for file in files.values() if isinstance(file, Path))
        described = self.parameters(component)
        if described > held + _LACKING:
            raise self.error(f"{component} is described as {described} numbers, and its weights have {held} bytes")
        return {"config.json": pipeline_classes.model_settings(model_class, library, self.config(component)), **files}

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
        other = [  # transformers before 5 gives names alone
            item if isinstance(item, str) else f"{item[0]} {list(item[1])} in place of {list(item[2])}"
            for item in report["mismatched_keys"]
        ]
        faults = [
            f"{what} {len(names)} of its tensors ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
            for what, names in (("missing are", missing), ("of another shape are", sorted(other)))
            if names
        ]
        if faults:
            _, class_name = self._class(component)
            raise self.error(
                f"the weights of {component} ({class_name}) are incomplete or another model's: {'; '.join(faults)}"
            )

    def _json(self, relative: str) -> dict[str, Any]:
        try:
            return read_json(self._file(relative))
        except (OSError, ValueError) as error:
            raise self.error(f"cannot read {relative}: {one_line(error)}") from error


def _needs_low_memory_flag(library: str) -> bool:
    """Whether weights are only read without a second copy on request: transformers before 5, with accelerate."""
    if library != "transformers" or importlib.util.find_spec("accelerate") is None:
        return False
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5
