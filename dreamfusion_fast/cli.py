"""The command line: generate, batch, app, export, view, sample, validate, doctor.

Only parsing and messages are here. torch and what is built on it are imported inside the commands, so that help and
doctor are quick and work where torch does not.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

from dreamfusion_fast import __version__
from dreamfusion_fast.errors import Interrupted, UserError, joined, missing_package, printable
from dreamfusion_fast.settings import Range, SettingError, Settings, settings_in, unchecked
from dreamfusion_fast.signals import stop_signals
from dreamfusion_fast.streams import unfailing_output

if TYPE_CHECKING:
    from dreamfusion_fast.export import Agreement
    from dreamfusion_fast.training.config import Config
    from dreamfusion_fast.training.ranks import Ranks

T = TypeVar("T")

PROG = "dreamfusion-fast"
_UNKNOWN = "Unrecognized options: "  # how tyro begins its message
# Errors of the surroundings, wherever a file is written.
_OUTER_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG)
USAGE = f"""\
Text to textured 3D mesh, by score distillation.

usage:
  {PROG} generate "an armchair" --out out/armchair   a prompt to mesh.glb, turntable.mp4, preview.png
  {PROG} generate --resume out/armchair              continue an interrupted run
  {PROG} batch prompts.txt --out runs                many prompts: all to meshes, on one page
  {PROG} app                                         objects in a browser: asked for, watched, stopped, turned
  {PROG} export out/armchair --resolution 256        make mesh and pictures again with other settings
  {PROG} view out/armchair                           the mesh in a browser, to turn: one page, no server
  {PROG} sample "an armchair" -n 9 --out grid.png    what the embedded 2D prior makes of a prompt
  {PROG} validate --guidance.name sdxl               whether a diffusion model does what it should, on one page
  {PROG} doctor                                      what works on this machine, what is missing, how to get it

{PROG} COMMAND --help lists the options of a command; --version prints the version.
--debug (or DREAMFUSION_FAST_DEBUG=1) shows the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's) and return the exit code.

    0: done. 2: a user error, reported in one line on stderr. 128 and the number of a signal: interrupted by it, 130 for
    Ctrl-C. Output that cannot be written is dropped, and changes nothing else.
    """
    with unfailing_output(), stop_signals():
        return _reported(argv)


def _reported(argv: Sequence[str] | None) -> int:
    """The exit code of a command, whose errors are printed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("DREAMFUSION_FAST_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _shown_log():
            return _run(arguments)
    except SystemExit as stop:  # argparse and tyro have printed their message
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT)
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


class _Stderr(logging.Handler):
    """Shows what the library logs as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    logger, handler = logging.getLogger("dreamfusion_fast"), _Stderr()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f'for a prompt: {PROG} generate "{command}"'
        raise UserError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}; {hint}")
    return COMMANDS[command](rest)


def _message(error: Exception) -> str | None:
    """The line to print for an error that is not a bug; None for one that is."""
    if isinstance(error, UserError):
        return joined(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if "torch" in sys.modules:
        from dreamfusion_fast.gpu.memory import is_out_of_memory, what_was_wanted

        if is_out_of_memory(error):
            return f"out of memory ({what_was_wanted(error)}); close what else uses it, or choose smaller settings"
    if isinstance(error, OSError) and error.errno in _OUTER_ERRORS:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return None


def _parse(kind: type[T], arguments: list[str], command: str, description: str, default: T | None = None) -> T:
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), unchecked():
            parsed = tyro.cli(kind, args=arguments, prog=f"{PROG} {command}", description=description, **options)
    except SystemExit as stop:
        if stop.code:
            problem = _sentence(printed.getvalue())
            if problem.startswith(_UNKNOWN):
                problem = _left_over(kind, arguments, problem.removeprefix(_UNKNOWN), options) or problem
            raise UserError(f"{problem}; see {PROG} {command} --help") from None
        raise
    for prefix, settings in settings_in(parsed):
        try:
            settings.check_values()
        except SettingError as error:
            before = prefix.removeprefix("settings.")  # export's, whose options have no prefix
            names = ", ".join(f"--{before}{name}".replace("_", "-") for name in error.name.split(", "))
            raise UserError(f"{names}: {error.problem}") from error
    return parsed


def _left_over(kind: type[T], arguments: list[str], unknown: str, options: dict[str, Any]) -> str | None:
    """The error where `unknown`, tyro's list, begins with a value that is one too many; None for an option."""
    import tyro

    named = [re.match("--?[A-Za-z]", word) is not None for word in arguments]
    for place, word in enumerate(arguments):
        if named[place] or not f"{unknown}, ".startswith(f"{word}, "):
            continue
        try:  # the same word may be a value elsewhere
            with contextlib.redirect_stderr(io.StringIO()), unchecked():
                _, surplus = tyro.cli(kind, args=arguments[: place + 1], return_unknown_args=True, **options)
        except SystemExit:  # a value is missing, or the prompt is
            continue
        if surplus == [word]:
            before = [option for option, is_option in zip(arguments[:place], named, strict=False) if is_option]
            if before:
                return f"{before[-1]} takes no more values, and {word} is one too many"
            return f"{word} is one too many; a prompt or path of several words goes in quotes"
    return None


def _sentence(box: str) -> str:
    """The first part of a framed message of tyro, below its title, as one line. The frame may be of ASCII."""
    lines = box.splitlines()
    parts: list[list[str]] = [[]]
    for line in lines:
        text = line.strip("│╭╮╰╯─ ")
        if not text.strip("-") or line.startswith("╭"):  # a rule, or a title, which says less than what follows
            parts.append([])
        else:
            parts[-1].append(text)
    said = [" ".join(part) for part in parts if part]
    if said[1:] and not lines[0].startswith("╭"):  # the title
        del said[0]
    return said[0].rstrip(".").removeprefix("Error parsing ") if said else "wrong options"


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, as the rest does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _generate(arguments: list[str]) -> int:
    # What --config or --resume hold are the defaults for the rest, and a model has settings of its own: read first.
    first = _Parser(prog=f"{PROG} generate", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    first.add_argument("--resume")
    first.add_argument("--guidance.name", dest="guidance")
    first.add_argument("--field")
    first.add_argument("--init")
    known, rest = first.parse_known_args(arguments)
    if known.guidance is not None:
        rest += ["--guidance.name", known.guidance]
    for option in ("config", "preset"):
        if getattr(known, option) is not None and known.resume is not None:
            raise UserError(f"give --{option} or --resume, not both; a resumed run has its own config")

    from dreamfusion_fast.io import open_run_folder
    from dreamfusion_fast.training.checkpoint import run_config
    from dreamfusion_fast.training.config import Config
    from dreamfusion_fast.training.device import resolve_device
    from dreamfusion_fast.training.presets import preset_names
    from dreamfusion_fast.training.ranks import joined_ranks, started_by_torchrun

    preset = None if known.preset is None else Config.from_preset(known.preset)
    base = preset or Config.for_guidance(known.guidance or "embedded")
    if known.config is not None:
        base = Config.load(known.config, guidance=known.guidance, base=preset)
    elif known.resume is not None:
        base = dataclasses.replace(run_config(open_run_folder(known.resume)), out=known.resume)
    for option in ("field", "init"):
        if getattr(known, option) is not None and known.resume is not None:
            raise UserError(f"give --{option} or --resume, not both; a resumed run has its own field")
    if known.init is not None:
        base = dataclasses.replace(base, init=known.init)
    if known.field is not None:
        base = base.with_field(known.field)
    config = _parse(
        Config,
        rest,
        "generate",
        "Make a textured mesh of what the prompt says.\n\n"
        "Besides the options below: --preset NAME takes the settings of a published recipe "
        f"({', '.join(preset_names())}), "
        "--field triplane takes three planes of features in place of the hash grid, "
        "--config FILE.yaml reads options from a file (it wins over the preset, the command line over both), "
        "--resume RUN continues an interrupted run.",
        base,
    )
    if known.resume is None:
        config.check_start()
    else:
        config.check()
        _check_same_run(base, config)
    if not started_by_torchrun():
        resolve_device(config.device)
        return _make(config, known.resume, None)
    with joined_ranks(config.device) as ranks:
        return _make(config, known.resume, ranks)


def _make(config: "Config", resume: str | None, ranks: "Ranks | None") -> int:
    from dreamfusion_fast.training.generator import Generator  # late, since wrong options are to be said at once

    generator = Generator(config, ranks=ranks) if resume is None else Generator.resume(resume, config, ranks=ranks)
    if ranks is not None and ranks.rank > 0:
        logging.getLogger("dreamfusion_fast").setLevel(logging.WARNING)  # the rest is said by rank 0
        generator.assist()
        return 0
    result = generator.run()
    _say_done(result.mesh.agreement, result.folder)
    return 0


def _batch(arguments: list[str]) -> int:
    from dreamfusion_fast.batch.command import command

    return command(arguments, _Parser(prog=f"{PROG} batch", add_help=False, allow_abbrev=False), _parse)


def _app(arguments: list[str]) -> int:
    from dreamfusion_fast.app.serve import command

    return command(arguments, _Parser(prog=f"{PROG} app", allow_abbrev=False))


def _say_done(agreement: "Agreement", folder: Path) -> None:
    print(agreement)
    if agreement.warning is not None:
        print(agreement.warning, file=sys.stderr)
    print(f"done: {folder}")


def _check_same_run(saved: "Config", given: "Config") -> None:
    if given.prompt != saved.prompt:
        raise UserError(
            f"--resume continues a run with the prompt {saved.prompt!r}; for {given.prompt!r} start another with --out"
        )
    if given.out != saved.out:
        raise UserError("--resume writes to the folder that it resumes; omit --out")


def _export(arguments: list[str]) -> int:
    import tyro

    from dreamfusion_fast.io import make_folder, open_run_folder
    from dreamfusion_fast.training.checkpoint import run_config
    from dreamfusion_fast.training.device import resolve_device
    from dreamfusion_fast.training.sections import ExportConfig

    @dataclasses.dataclass(frozen=True)
    class Export:
        run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
        """Output folder of an earlier run."""
        settings: tyro.conf.OmitArgPrefixes[ExportConfig] = dataclasses.field(default_factory=ExportConfig)
        out: str = ""
        """Folder to write to; by default the run's own, where older results are replaced."""
        device: str = "auto"
        """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    description = "Make mesh.glb, turntable.mp4 and preview.png of a run again; what is not given is as in the run."
    run = _parse(Export, arguments, "export", description).run
    # The run's own settings are the defaults, and only now is it known which run.
    folder = open_run_folder(run, writable=False)
    saved = run_config(folder)
    given = _parse(Export, arguments, "export", description, Export(run=run, settings=saved.export))
    resolve_device(given.device)
    out = make_folder(given.out or run)
    from dreamfusion_fast.training.generator import Generator

    config = dataclasses.replace(saved, export=given.settings, device=given.device, out=run)
    mesh = Generator.resume(run, config).export(out)
    _say_done(mesh.agreement, out)
    return 0


def _view(arguments: list[str]) -> int:
    parser = _Parser(
        prog=f"{PROG} view",
        description="Write one page that shows the mesh, to turn by mouse or touch, and open it: no server.",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, or a .glb file")
    parser.add_argument("--out", metavar="PAGE", help="file to write; by default view.html in the run's folder")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    given = parser.parse_args(arguments)
    from dreamfusion_fast.view import write_view

    path = write_view(given.run, given.out)
    if not given.no_open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    print(f"done: {path}")
    return 0


def _sample(arguments: list[str]) -> int:
    import tyro

    from dreamfusion_fast.io import make_folder, user_path

    @dataclasses.dataclass(frozen=True)
    class Sample(Settings):
        prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
        """The subject of the pictures; may end in front view, side view, back view or overhead view."""
        n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1, 1024)] = 9
        """Number of pictures."""
        out: str = "grid.png"
        """Picture to write. One that exists is refused, unless --overwrite is given."""
        overwrite: bool = False
        """Replace an existing picture."""
        seed: Annotated[int, Range(0, 2**63 - 1)] = 0
        """Seeds the noise."""
        guidance_scale: Annotated[float, Range(-1000, 1000)] = 3.0
        """Strength of classifier-free guidance; 1 for none."""
        steps: Annotated[int, Range(1, 1000)] = 40
        """Denoising steps."""
        device: str = "auto"
        """auto (the GPU if there is one), cpu, cuda or cuda:1."""
        prior: str = ""
        """Folder of other weights of the prior (tools/pack_prior.py); by default the package's own."""

    given = _parse(Sample, arguments, "sample", "Draw pictures with the embedded 2D prior, without any 3D.")
    if not given.prompt.strip():
        raise UserError('the prompt is empty; say what to draw, such as "an armchair, side view"')
    out = user_path(given.out, "--out")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out has to end in .png, not {given.out!r}")
    if out.exists() and not given.overwrite:
        raise UserError(f"{out} exists; choose another with --out, or give --overwrite")
    folder = user_path(given.prior, "--prior") if given.prior else None
    make_folder(out.parent)

    from dreamfusion_fast.export.turntable import save_png, tile
    from dreamfusion_fast.guidance.models.embedded.sample import sample_images
    from dreamfusion_fast.training.device import resolve_device

    images = sample_images(
        given.prompt, given.n, given.seed, given.guidance_scale, given.steps, str(resolve_device(given.device)), folder
    )
    _, height, width, _ = images.shape  # the views of a group lie in a row
    save_png(out, tile(list(images), math.ceil(math.sqrt(given.n * height / width))))
    print(f"done: {out}")
    return 0


def _validate(arguments: list[str]) -> int:
    from dreamfusion_fast.io import make_folder, user_path, write_text
    from dreamfusion_fast.training.device import resolve_device
    from dreamfusion_fast.validation.config import ValidateConfig

    given = _parse(
        ValidateConfig,
        arguments,
        "validate",
        "Load a diffusion model, let it draw and guide a short run, and compare what it does with what is expected. "
        "Exit code 0: all is as expected; 1: something is not.",
    )
    given.check()
    out = user_path(given.out, "--out")
    page = out / "index.html"
    if page.exists() and not given.overwrite:
        raise UserError(f"{page} exists; choose another folder with --out, or give --overwrite")
    resolve_device(given.device)
    make_folder(out)
    from dreamfusion_fast.validation.run import validate

    report = validate(given)
    write_text(out / "validation.json", report.to_json())
    write_text(page, report.to_html())
    print(f"{report.summary()}; done: {page}")
    return 1 if report.failures else 0


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog=f"{PROG} doctor",
        description="Say what works on this machine, what is missing, how to get it. Exit code 0: generate can run.",
    ).parse_args(arguments)
    from dreamfusion_fast.doctor import examine, report

    checks = examine()
    print(report(checks))
    return 1 if any(check.fatal for check in checks) else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "generate": _generate,
    "batch": _batch,
    "app": _app,
    "export": _export,
    "view": _view,
    "sample": _sample,
    "validate": _validate,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
