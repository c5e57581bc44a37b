"""`gmp-atl COMMAND`: one per rule, its options being the parameters of the stage's function, and some for people."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from gmp_atl.errors import CPU_PROFILE, NO_GPUS, NOTICE, NOTICE_PREFIX, UserError
from gmp_atl.leases import take_gpu

STAGES = {
    "synthesis": "write the synthetic demo corpus",
    "corpus": "release on disk to utterance table",
    "pretrained": "fetch or make the pre-trained HuBERT",
    "local_features": "audio to the output of HuBERT's convolutions",
    "multitask": "stage 1: train HuBERT on emotion and gender",
    "layer_features": "hidden states of the stage-1 HuBERT",
    "clustering": "stage 2: k-means pseudo-labels (GMPs) of one codebook",
    "cluster_statistics": "what the codebooks hold",
    "retraining": "stage 3: masked prediction of the GMPs",
    "finetuning": "stage 4: fine-tune on emotion",
    "evaluation": "stage 5: classify the held-out utterances",
    "examples": "single utterances for the report",
    "functionals": "openSMILE eGeMAPS functionals of every clip",
    "baseline": "classical reference: functionals and an SVM",
    "speech": "speech without labels, to pre-train an encoder on",
    "mfcc": "its cepstral coefficients",
    "pretraining": "an encoder from random weights, by masked prediction",
    "probe": "what the layers of a frozen encoder tell of emotion",
    "probes": "probes and training curves as a table and figures",
    "pretrain": "a pre-trained encoder as it is handed on",
    "tables": "evaluations to Tables 1-4",
    "figures": "evaluations to figures",
    "archive": "evaluations, histories and records in one file",
}


class _Formatter(logging.Formatter):
    """Plain lines; those that the progress display passes on are marked."""

    def format(self, record: logging.LogRecord) -> str:
        mark = NOTICE_PREFIX if record.levelno >= NOTICE else ""
        return "\n".join(mark + line for line in super().format(record).splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one message on stderr and exit code 2, without a traceback.

    So is a file that the system will not look at: in a closed folder, or with a name that no file can have.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("faiss").setLevel(logging.WARNING)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(argv[0], argv[1:]) if argv and argv[0] in STAGES else _command(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"gmp-atl {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"gmp-atl {argv[0]}: error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2


def _command(argv: list[str]) -> int:
    """Of those for people."""
    stages = "\n".join(f"  {stage:20}{what}" for stage, what in STAGES.items())
    parser = argparse.ArgumentParser(
        "gmp-atl",
        description="Speech emotion recognition by GMP-ATL: checks, tables and models of a run.\n"
        "Runs are made by Snakemake (see README.md): snakemake --cores all",
        epilog=f"stages, which the workflow calls, each with --help of its own:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_doctor, _add_show, _add_restore, _add_predict, _add_export):
        add(commands)
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that asks what may follow
        import argcomplete

        for stage, what in STAGES.items():
            commands.add_parser(stage, help=what)
        argcomplete.autocomplete(parser)
    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _run(stage: str, argv: list[str]) -> int:
    threads = _threads()
    # Threads and device must be settled before numpy, torch or faiss is imported with the stage.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, parents=[threads])
    early.add_argument("--gpus", type=int, default=0)
    known, _ = early.parse_known_args(argv)
    _settle(known.threads, known.gpus, CPU_PROFILE)
    function: Callable[..., None] = getattr(importlib.import_module(f"gmp_atl.stages.{stage}"), stage)
    parser = argparse.ArgumentParser(f"gmp-atl {stage}", description=inspect.getdoc(function), parents=[threads])
    parser.add_argument("--provenance", type=Path, help="JSON file that gets the job's record (default: none)")
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        _add(parser, name, hints[name], parameter)
    options = vars(parser.parse_args(argv))
    options.pop("threads")
    with _recorded(stage, function, options, options.pop("provenance")):
        function(**options)
    return 0


def _threads() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    return parser


def _settle(threads: int | None, gpus: int, otherwise: str) -> None:
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        take_gpu(otherwise=otherwise)


def _recorded(
    stage: str, function: Callable[..., None], options: Mapping[str, Any], path: Path | None
) -> AbstractContextManager[None]:
    if path is None:
        return nullcontext()
    from gmp_atl.provenance import recording

    annotations = get_type_hints(function, include_extras=True)
    roles = {name: next(iter(getattr(annotations[name], "__metadata__", ())), None) for name in options}
    return recording(path, stage, options, roles)


def _add(parser: argparse.ArgumentParser, name: str, kind: Any, parameter: inspect.Parameter) -> None:
    """Declare a keyword parameter as an option of the same name and type."""
    flag = f"--{name.replace('_', '-')}"
    default = None if parameter.default is parameter.empty else parameter.default
    options: dict[str, Any] = {"required": parameter.default is parameter.empty, "default": default}
    if kind in (Path, int, str):
        parser.add_argument(flag, type=kind, **options)
    elif get_origin(kind) is Literal:
        parser.add_argument(flag, choices=get_args(kind), **options)
    elif list[Path] in get_args(kind):  # may be left out
        parser.add_argument(flag, nargs="+", type=Path, **options)
    elif type(None) in get_args(kind):  # "none" stands for None
        inner = next(each for each in get_args(kind) if each is not type(None))
        parser.add_argument(flag, type=lambda text: None if text == "none" else inner(text), **options)
    elif get_args(kind):  # list[Path], list[int]
        parser.add_argument(flag, nargs="+", type=get_args(kind)[0], **options)
    else:  # a slice of the config, as JSON
        parser.add_argument(flag, type=lambda text: _section(flag, kind, text), **options)


def _section(flag: str, kind: Any, text: str) -> Any:
    try:
        return kind.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} is not a {kind.__name__} in JSON: {error}") from None


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_doctor(commands: _Commands) -> None:
    text = "check what a run needs on this machine"
    description = f"{text.capitalize()}; exit code 1: it lacks some."
    parser = commands.add_parser("doctor", help=text, description=description, allow_abbrev=False)
    help = "as for snakemake: changes to config.yaml, which lies in the working directory"
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], metavar="FILE", help=help)
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="KEY=VALUE", help="as for snakemake: further changes"
    )
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from gmp_atl import doctor

    return doctor.report([Path("config.yaml"), *options.configfile], options.config)


def _add_restore(commands: _Commands) -> None:
    text = "make the tables and figures of an archive anew"
    parser = commands.add_parser("restore", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("archive", type=Path, help="as written by `make archive`")
    parser.add_argument("--output", type=Path, help="folder (default: results/<archive>-restored)")
    parser.set_defaults(run=_restore)


def _restore(options: argparse.Namespace) -> int:
    from gmp_atl.rendering import show
    from gmp_atl.stages.archive import compare, restore
    from gmp_atl.stages.figures import figures
    from gmp_atl.stages.tables import tables

    output = options.output or Path("results") / f"{options.archive.stem}-restored"
    config = restore(options.archive, output)
    for stage, folder in ((tables, "tables"), (figures, "figures")):
        stage(config=config, evaluations=output / "evaluations", output=output / folder)
    same, differing = compare(output)
    show(output / "tables")
    print(f"\n{same} tables and figures in {output} are byte for byte those of the archived run.")
    if differing:
        print(f"These differ, as other versions of gmp-atl or of its packages make them: {', '.join(differing)}")
    return 0


def _add_show(commands: _Commands) -> None:
    text = "print the tables of a run"
    parser = commands.add_parser("show", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("folder", type=Path, help="results/<name>/tables")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    from gmp_atl.rendering import show

    show(options.folder)
    return 0


def _add_predict(commands: _Commands) -> None:
    text = "score recordings by a fine-tuned model"
    description = f"{text.capitalize()}; see docs/predict.md. Exit code 1: some could not be scored."
    parser = commands.add_parser("predict", help=text, description=description, parents=[_threads()])
    parser.add_argument("model", type=Path, help="folder of a fine-tuned model: results/<name>/finetuning/...")
    help = "audio that libsndfile reads, or folders, which are searched through"
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER", help=help)
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: table")
    parser.add_argument("--output", type=Path, help="file (default: standard output)")
    parser.add_argument("--window", type=_seconds, default=60.0, help="longer recordings are cut (default: 60 s)")
    parser.add_argument("--hop", type=_seconds, help="from window to window, in s (default: the window, no overlap)")
    help = "audio that is computed at once, in s; less takes less memory (default: 320)"
    parser.add_argument("--batch-seconds", type=_seconds, default=320.0, help=help)
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="1: on a GPU (default: 0, on the CPU)")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    _settle(options.threads, options.gpus, NO_GPUS)
    from gmp_atl.prediction import command
    from gmp_atl.recordings import Cut

    unusable = command(
        options.model,
        options.paths,
        layout=options.format,
        output=options.output,
        cut=Cut.of_seconds(options.window, options.hop),
        batch_seconds=options.batch_seconds,
        gpus=options.gpus,
    )
    return 1 if unusable else 0


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


_seconds.__name__ = "positive number"  # argparse names it when it refuses a value


def _add_export(commands: _Commands) -> None:
    text = "write a fine-tuned model for Hugging Face's transformers"
    parser = commands.add_parser("export", help=text, description=f"{text.capitalize()}; see docs/predict.md.")
    parser.add_argument("model", type=Path, help="folder of a fine-tuned model: results/<name>/finetuning/...")
    parser.add_argument("output", type=Path, help="folder, which must not exist yet")
    help = "results/<name>/evaluations, which the model card tells of (default: those of the model's run)"
    parser.add_argument("--evaluations", type=Path, help=help)
    parser.add_argument(
        "--onnx", action="store_true", help="add model.onnx, which needs neither torch nor this package"
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from gmp_atl.hub import export

    export(options.model, options.output, options.evaluations, onnx=options.onnx)
    return 0
