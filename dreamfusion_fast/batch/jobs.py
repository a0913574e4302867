"""From a file of prompts to the runs that it asks for. All that is wrong in it is found before one of them starts."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dreamfusion_fast.batch.outcome import finished
from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE
from dreamfusion_fast.io import RunFolder, default_run_folders, user_path
from dreamfusion_fast.settings import shown
from dreamfusion_fast.training.checkpoint import run_config
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.config_io import differences, parse_yaml

Base = Callable[["str | None", "str | None"], Config]
"""The settings that a row starts from, by the names of its preset and of its guidance, if it has any."""

_LARGEST_FILE = 2**21  # bytes; some 20,000 prompts
_SHORT = {"negative_prompt": "guidance.negative_prompt"}
_TEXTS = ("prompt", "name", "preset", "init", "guidance.negative_prompt", "guidance.name")  # of a table, as they are
_BATCHS = {
    "out": "runs are in the batch's folder; name is the name of one",
    "device": "it is the batch's to say: --device",
}
# Of a run that is there, what may be other than its row says: it changes where or how fast, and not what.
_FREE = ("out", "device", "log", "memory", "profile")


@dataclass(frozen=True)
class Job:
    """One run of a batch.

    Attributes:
        line: of the file, from 1.
        name: of its folder below the batch's.
        config: with `out`.
        done: whether an earlier batch has finished it.
    """

    line: int
    name: str
    config: Config
    done: bool = False


class ProblemsError(UserError):
    """What is wrong in a file: `problems`, a line each."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.path, self.problems = path, problems


def read_jobs(path: str | Path, out: str | Path, base: Base) -> list[Job]:
    """The runs that a file of prompts asks for, in its order.

    Args:
        path: text with a prompt per line, .yaml or .yml with a list, or .csv with a header. docs/batch.md describes
            them.
        out: the batch's folder, whether it is there or not.
        base: what a row starts from.

    Raises:
        ProblemsError: something in the file cannot be done, or a run in `out` is another than the file asks for.
        UserError: the file cannot be read.
    """
    path = user_path(path, "file of prompts")
    problems: list[str] = []
    jobs: list[Job] = []
    for line, row in _rows(path, problems):
        jobs += _jobs_of(row, line, f"{path} line {line}", base, problems)
    if not jobs and not problems:
        raise UserError(f"{path} holds no prompt; write one per line")
    jobs = _named(jobs, Path(out), path, problems)
    checked = [_against_what_is_there(job, path, problems) for job in jobs]
    if problems:
        raise ProblemsError(path, problems)
    return checked


def _rows(path: Path, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line and keys of each row."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8") from error
    if len(data) > _LARGEST_FILE:
        raise UserError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB; make several files of it")
    suffix = path.suffix.lower()
    read = _csv_rows if suffix == ".csv" else _yaml_rows if suffix in (".yaml", ".yml") else _text_rows
    for line, row in read(text, path, problems):
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            problems.append(f"{path} line {line}: got {shown(row)}, want a prompt or a mapping with one")
            continue
        yield line, _flat(row, f"{path} line {line}", problems)


def _text_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    for line, words in enumerate(text.splitlines(), 1):
        if words.strip() and not words.lstrip().startswith("#"):
            yield line, words.strip()


def _yaml_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    rows = parse_yaml(text, source=str(path), largest=_LARGEST_FILE)
    if not isinstance(rows, list):
        raise UserError(f"{path}: got {shown(rows)}, want a list: a prompt per item, or a mapping with one")
    root: Any = yaml.compose(text, yaml.SafeLoader)
    lines = [node.start_mark.line + 1 for node in root.value]
    yield from zip(lines, rows, strict=True)


def _csv_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        twice = {name for name in header if header.count(name) > 1}
        if "prompt" not in header or twice or "" in header:
            wrong = f"{', '.join(sorted(twice))} twice" if twice else ", ".join(map(repr, header)) or "nothing"
            raise UserError(f"{path} line 1: got the columns {wrong}, want names, each once, with prompt among them")
        reader.fieldnames = header
        for row in reader:
            if surplus := row.pop("", None):
                problems.append(f"{path} line {reader.line_num}: {shown(surplus)} is in no column; want {len(header)}")
                continue
            cells = {name: cell.strip() for name, cell in row.items() if cell is not None and cell.strip()}
            yield reader.line_num, {name: _cell(name, cell) for name, cell in cells.items()}
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num}: no valid CSV ({joined(error)})") from error


@dataclass(frozen=True)
class _Cell:
    """A cell of a table, which does not say whether 12 is a number."""

    text: str

    @property
    def value(self) -> Any:
        try:
            return parse_yaml(self.text)
        except UserError:
            return self.text


def _cell(name: str, text: str) -> Any:
    return text if _SHORT.get(name, name) in _TEXTS else _Cell(text)


def _flat(row: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """A row's values by dotted name, whether they were written so or as mappings in mappings."""
    flat: dict[str, Any] = {}

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            name = prefix + str(key).strip().replace("-", "_")
            name = _SHORT.get(name, name)
            if isinstance(value, Mapping):
                add(value, f"{name}.")
            elif name in flat:
                problems.append(f"{where}: {name} is given twice")
            else:
                flat[name] = value

    add(row, "")
    return flat


def _jobs_of(row: Mapping[str, Any], line: int, where: str, base: Base, problems: list[str]) -> list[Job]:
    """The runs of one row: one, or one per seed."""
    found: list[str] = []
    values = {key: value for key, value in row.items() if value is not None}
    found += [f"{where}: {key}: {why}" for key, why in _BATCHS.items() if values.pop(key, None) is not None]
    name, preset, seeds = (_plain(values.pop(key, None)) for key in ("name", "preset", "seeds"))
    if name is not None and (not isinstance(name, str) or not _is_folder_name(name)):
        found.append(f"{where}: name: got {shown(name)}, want the name of a folder, without / and not beginning with .")
    if preset is not None and not isinstance(preset, str):
        found.append(f"{where}: preset: got {shown(preset)}, want a name")
        preset = None
    seed_list = _seeds(seeds, where, found)
    if seed_list is not None and "seed" in values:
        found.append(f"{where}: seed, seeds: got both, want one of them")
    if not isinstance(values.get("prompt", ""), str) or not values.get("prompt", "").strip():
        found.append(f"{where}: prompt: got {shown(values.get('prompt', ''))}, want what to make")
        values["prompt"] = "x"  # so that the other values are checked
    guidance = values.get("guidance.name")
    try:
        start = base(preset, guidance if isinstance(guidance, str) else None)
        config = _config(values, where, start, found)
        if config is not None:
            _check_guidance(config)
    except UserError as error:
        found.append(f"{where}: {joined(error)}")
        config = None
    problems += found
    if found or config is None:
        return []
    configs = [config] if seed_list is None else [dataclasses.replace(config, seed=seed) for seed in seed_list]
    return [Job(line, name or "", each) for each in configs]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Cell) else value


def _is_folder_name(name: str) -> bool:
    return bool(re.fullmatch(r"[^/\\\0.][^/\\\0]{0,119}", name)) and name.isprintable()


def _seeds(value: Any, where: str, found: list[str]) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\d+([ ;,]+\d+)*", value):  # of a table
        value = [int(word) for word in re.split(r"[ ;,]+", value)]
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(seed) is int and 0 <= seed < 2**63 for seed in values):
        found.append(f"{where}: seeds: got {shown(value)}, want whole numbers of at least 0, such as [1, 2, 3]")
        return None
    if len(set(values)) < len(values):
        found.append(f"{where}: seeds: got {shown(value)}, want each once")
        return None
    return values


def _config(values: Mapping[str, Any], where: str, base: Config, found: list[str]) -> Config | None:
    """The settings of a row; where some are refused, each of them in `found`, and None."""
    left, good = dict(values), True
    while True:
        try:
            config = _read(left, where, base)
            config.check_start()
            return config if good else None
        except UserError as error:
            good, said = False, joined(error)
            found.append(said if said.startswith(where) else f"{where}: {said}")
        blamed = [key for key in left if _reads({k: v for k, v in left.items() if k != key}, where, base) != said]
        if not blamed:
            return None
        del left[blamed[-1]]


def _reads(values: Mapping[str, Any], where: str, base: Config) -> str | None:
    """The error of such settings."""
    try:
        _read(values, where, base).check_start()
    except UserError as error:
        return joined(error)
    return None


def _read(values: Mapping[str, Any], where: str, base: Config) -> Config:
    cells = [key for key, value in values.items() if isinstance(value, _Cell)]
    plain = {key: _plain(value) for key, value in values.items()}
    try:
        return Config.from_dict(_nested(plain, where), source=where, base=base)
    except UserError:
        # A setting that is text, and whose cell looks like something else: a revision of digits alone.
        for key in cells:
            try:
                Config.from_dict(_nested({key: plain[key]}, where), source=where, base=base)
            except UserError:
                try:
                    Config.from_dict(_nested({key: values[key].text}, where), source=where, base=base)
                except UserError:
                    continue
                plain[key] = values[key].text
        return Config.from_dict(_nested(plain, where), source=where, base=base)


def _nested(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        below = tree
        for part in above:
            below = below.setdefault(part, {})
            if not isinstance(below, dict):
                raise UserError(f"{where}: {name}: {part} has a value of its own; want one or the other")
        if last in below:
            raise UserError(f"{where}: {name}: got a value and settings in it, want one or the other")
        below[last] = value
    return tree


def _check_guidance(config: Config) -> None:
    """Raise UserError for a guidance that can be seen not to be there; a hub id is not looked up."""
    name = config.guidance.name
    if name in KNOWN_GUIDANCE or (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()):
        return
    from dreamfusion_fast.guidance.models.pipeline_origins import open_source

    open_source(config.guidance)


def _named(jobs: list[Job], out: Path, path: Path, problems: list[str]) -> list[Job]:
    """The runs with their folders, which depend on the prompt and, if that alone is not enough, on the seed."""
    slugs = [job.name or next(iter(default_run_folders(job.config.prompt))).name for job in jobs]
    named: list[Job] = []
    lines: dict[str, int] = {}
    for job, slug in zip(jobs, slugs, strict=True):
        name = slug if slugs.count(slug) == 1 else f"{slug}-seed{job.config.seed}"
        if name in lines:
            problems.append(
                f"{path} line {job.line}: name: is {name}, as in line {lines[name]}; give another seed, or a name"
            )
        lines.setdefault(name, job.line)
        named.append(dataclasses.replace(job, name=name, config=dataclasses.replace(job.config, out=str(out / name))))
    return named


def _against_what_is_there(job: Job, path: Path, problems: list[str]) -> Job:
    """The run as an earlier batch left it; a run with other settings in its folder is a problem."""
    where = f"{path} line {job.line}"
    try:
        folder = RunFolder(user_path(job.config.out, "output folder"))
        if not folder.checkpoint.is_file():
            folder.check_unused()
            return job
        saved, wanted = run_config(folder).to_dict(), job.config.to_dict()
    except UserError as error:
        problems.append(f"{where}: {joined(error)}")
        return job
    for name in _FREE + (("batch",) if job.config.batch is None else ()):
        del saved[name], wanted[name]
    if different := differences(saved, wanted):
        problems.append(
            f"{where}: {folder.path} holds a run with other settings ({'; '.join(different[:3])}); give the row "
            "another name, or the batch another --out"
        )
    return dataclasses.replace(job, done=finished(folder))
