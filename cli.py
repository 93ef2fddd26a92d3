"""The commands. Each parses its arguments and calls one function; nothing heavy is imported before that.

Exit codes: 0 done, 1 failure, 2 wrong input, 75 interrupted with everything saved, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deltanet_errors import DeltanetError, one_line

# What a file system says of a path that the user named.
OF_A_PATH = {
    getattr(errno, name) for name in ("EACCES", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOTDIR", "EPERM", "EROFS")
}
# We check for ourselves what these libraries warn of, and say it once.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other wrong input."""

    def error(self, message):
        self.tell(f"{message} (--help lists the options)")
        self.exit(2)

    def refuse_no_names(self, values: dict) -> None:
        """Ends the command where a name is empty, as of a variable that is not set: a path would take it for the
        current folder. The same where it holds a zero byte, which no name does."""
        for action in self._actions:
            value = values.get(action.dest)
            if action.dest in ("prompt", "message") or not isinstance(value, str) or (value and "\0" not in value):
                continue
            name = action.option_strings[-1] if action.option_strings else action.metavar
            self.error(f"{name}: {'holds a zero byte' if value else 'is empty'}")

    def tell(self, text: str) -> None:
        """One line on stderr, in which no secret is repeated that an option held by mistake."""
        from distill.redact import mask

        print(f"{self.prog}: {mask(text)}", file=sys.stderr)


def _parser(command: str, description: str, epilog: str) -> _Parser:
    parser = _Parser(
        prog=command,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the versions that matter and exit"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        print(f"{parser.prog} {_installed('deltanet') or _of_source()}")
        for package in ("torch", "triton", "transformers", "deepspeed"):
            print(f"  {package} {_installed(package) or 'not installed'}")
        parser.exit()


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_source() -> str:
    """What pyproject.toml beside this file says, where the project runs from its folder."""
    import tomllib

    try:
        project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return f"{project['version']} (not installed)"
    except (OSError, ValueError, KeyError):
        return "of unknown version"


def _run(parser: _Parser, argv: Sequence[str] | None, call: Callable) -> int:
    """Parses, calls, and turns errors into one line on stderr and an exit code."""
    arguments = parser.parse_intermixed_args(argv)  # KEY.PATH=VALUE may follow an option
    parser.refuse_no_names(vars(arguments))
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    try:
        call(arguments)
        return 0
    except KeyboardInterrupt as stop:
        print(f"{parser.prog}: stopped by {stop.args[0].name if stop.args else 'Ctrl-C'}", file=sys.stderr)
        return 128 + stop.args[0] if stop.args else 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename is not None:
            parser.tell(f"{error.filename}: {error.strerror}")
            return 2
        if not isinstance(error, DeltanetError):
            kind = type(error).__name__
            told = one_line(error).removeprefix(f"{kind}: ")
            parser.tell(f"{kind}: {told} (--debug shows where)")
            return 1
        parser.tell(str(error))
        return error.exit_code


def convert_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "deltanet-convert",
        "Turn a pretrained transformer into a student whose layers run on the delta rule.",
        "examples:\n"
        "  deltanet-convert demo -o student\n"
        "  deltanet-convert llama-1b --hybrid global2 -o student\n"
        "  deltanet-convert ./my-model --hybrid every:4 --calibrate text.jsonl -o student\n"
        "  deltanet-convert ./my-model --hybrid none --local-window 0 -o student    # states alone\n"
        "  deltanet-convert ./my-model --rank recall --calibrate text.jsonl -o ranking.json\n"
        "  deltanet-convert ./my-model --hybrid ranking.json:4 --calibrate text.jsonl -o student\n"
        "  deltanet-convert student --verify\n"
        "  deltanet-convert student --format remote -o student-remote\n"
        "  deltanet-convert qwen3-0.6b --compat qwen3_5 -o student",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint folder, .gguf file, preset, Hub id (owner/name), or demo"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="the student's folder, or the file of a ranking; it must not exist"
    )
    parser.add_argument(
        "--hybrid",
        default="global2",
        metavar="LAYOUT",
        help="which layers keep attention, counted from 0: global2 (1 and N//2), swa[:WINDOW] (odd ones, sliding), "
        "every:N (the last of each N), none, all, layers:1,5,9, or RANKING.json:COUNT (default: global2)",
    )
    parser.add_argument(
        "--rank",
        metavar="METHOD",
        help="convert nothing; score which layers need attention most and write RANKING.json to OUT, by linearity, "
        "fit, swap, recall, greedy or distilled[:STEPS]",
    )
    parser.add_argument("--mixer", metavar="M", help="gated_delta (default) or delta")
    parser.add_argument(
        "--state-heads",
        metavar="S",
        help="a state per key/value head (shared, default) or query head (expanded, default without a window)",
    )
    parser.add_argument(
        "--state-positions",
        metavar="P",
        help="of what a state holds: rotary (the teacher's, default) or fixed (all as far back as --local-window; "
        "with 0 no RoPE there)",
    )
    parser.add_argument(
        "--feature-map",
        metavar="F",
        help="of the queries and keys of a state: linear (learned, per head; identity at first) or none (default)",
    )
    parser.add_argument(
        "--skip-conv",
        type=int,
        metavar="TAPS",
        help="tokens of v that bypass the state; 0 is off (default: 0, without a window 4)",
    )
    parser.add_argument(
        "--local-window",
        type=int,
        metavar="W",
        help="softmax attention to the last W tokens and the first; the state holds those before; 0: off (default 128)",
    )
    parser.add_argument(
        "--conv", type=int, metavar="K", help="convolution over q, k, v of K tokens; 0 is off (default: 0)"
    )
    parser.add_argument(
        "--gate", metavar="G", help="on what is read: read (per head, default), output (per channel), both, none"
    )
    parser.add_argument("--beta-range", type=int, metavar="B", help="write strength up to 1 (default) or 2")
    parser.add_argument(
        "--compat",
        metavar="NAME",
        help="make the student so that --format NAME can write it later: fla or qwen3_5; it starts less close",
    )
    parser.add_argument("--dtype", default="auto", metavar="D", help="auto (the source's), float32, bfloat16, float16")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=["self"],
        metavar="TEXT",
        help="files (txt, md, json, jsonl, parquet, also .gz), self (the teacher writes, default) or none (plain copy)",
    )
    parser.add_argument("--held-out", metavar="TEXT", help="file to measure on (default: the last tenth of TEXT)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new student is complete")
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="convert nothing; check that the folder SOURCE is whole: digests, tensors, tokenizer, loading",
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="convert nothing; write the student SOURCE to OUT in a form for others: remote (with its own code), fla "
        "(flash-linear-attention) or qwen3_5 (transformers' own class)",
    )
    parser.add_argument("--device", default="auto", help="of the calibration: auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin where there are no safetensors"
    )
    parser.add_argument(
        "--presets", action=_Presets, nargs=0, default=argparse.SUPPRESS, help="print the presets and exit"
    )
    return parser


class _Presets(argparse.Action):
    def __call__(self, parser, *_):
        from convert.presets import table

        print(table())
        parser.exit()


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP let the command remove what it has half written; a second one ends it at once."""

    def stop(number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number))

    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def convert_main(argv: Sequence[str] | None = None) -> int:
    def call(arguments: argparse.Namespace) -> None:
        from convert.command import run

        with _ended_as_by_ctrl_c():
            run(arguments)

    return _run(convert_parser(), argv, call)


def push_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "deltanet-push",
        "Send a verified student to the Hugging Face Hub as one commit, with the token of `hf auth login` or HF_TOKEN.",
        "examples:\n"
        "  deltanet-push student user/name --dry-run\n"
        "  deltanet-push student user/name\n"
        "  deltanet-push runs/chat/export user/name --public --card README-edited.md",
    )
    parser.add_argument("folder", metavar="FOLDER", help="what deltanet-convert or deltanet-distill wrote")
    parser.add_argument("repository", metavar="user/name", help="on the Hub; made where it is missing, private")
    parser.add_argument("--public", action="store_true", help="let everybody read it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made where it is missing")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--card", metavar="FILE", help="send FILE as README.md, in place of the one in FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="verify, list what would be sent; asks the Hub nothing")
    return parser


def push_main(argv: Sequence[str] | None = None) -> int:
    def call(arguments: argparse.Namespace) -> None:
        from convert.publish.push import run

        run(arguments)

    return _run(push_parser(), argv, call)


def generate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "deltanet-generate",
        "Let a student (or a teacher) continue a prompt; the text streams to standard output.",
        "examples:\n"
        '  deltanet-generate student "Once upon a time"\n'
        '  deltanet-generate demo "Once upon a time"\n'
        '  deltanet-generate student --chat "What is the capital of France?"\n'
        "  echo 'Once upon' | deltanet-generate student -",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, .gguf file, preset, Hub id (owner/name), or demo"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a question in the model's chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most N tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the top mass P (default: 1)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest; 0 is off (default: 0)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (default: 1)"
    )
    parser.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beam search (does not stream; default: 1)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    return parser


def generate_main(argv: Sequence[str] | None = None) -> int:
    def call(arguments: argparse.Namespace) -> None:
        from convert.sources import open_source
        from deltanet.generate import generate

        options = {key: value for key, value in vars(arguments).items() if key != "debug"}
        if Path(arguments.model).is_dir():
            generate(**options)
            return
        with open_source(arguments.model) as source:
            generate(**options | {"model": str(source.folder)})

    return _run(generate_parser(), argv, call)


def distill_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "deltanet-distill",
        "Distil a student against its teacher, as a recipe says. A run that was stopped goes on where it was.",
        "examples:\n"
        "  deltanet-distill quickstart\n"
        "  deltanet-distill quickstart stages.align.steps=100 --output runs/try\n"
        "  torchrun --nproc-per-node 8 --no-python deltanet-distill recipes/qwen3-8b.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", help="changes a key of the recipe")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the run (default: runs/NAME of the recipe)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest good commit (auto), refuse a folder that has one (never), or from the commit "
        "PATH (default: auto)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print data, stages and memory; train nothing")
    parser.add_argument("--print-config", action="store_true", help="print the recipe with every default filled in")
    return parser


def distill_main(argv: Sequence[str] | None = None) -> int:
    def call(arguments: argparse.Namespace) -> None:
        from distill.command import run

        run(arguments)

    return _run(distill_parser(), argv, call)


def eval_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "deltanet-eval",
        "Measure what a student can do, beside its teacher: language, tasks, speed and memory.",
        "examples:\n"
        "  deltanet-eval student --against teacher --text valid.jsonl -o report\n"
        "  deltanet-eval student --tasks piqa.jsonl lambada.jsonl --text none --contexts none\n"
        "  deltanet-eval student --against teacher --contexts 2048 8192 32768 --json",
    )
    parser.add_argument("student", metavar="STUDENT", help="checkpoint folder of a student, or of any transformer")
    parser.add_argument("--against", metavar="TEACHER", help="the model to compare with: a folder, a preset, a Hub id")
    parser.add_argument(
        "--text",
        default="self",
        metavar="FILE",
        help="held-out text (txt, md, json, jsonl, parquet, also .gz), self (the teacher writes, default) or none",
    )
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of the text (default: 16384)")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens that a model sees at once (default: 1024, or its range)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["all"],
        metavar="TASK",
        help="generated tasks by name, all of them (default), .jsonl files of standard sets, or none",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="examples of a task (default: all of a file; of a generated task 200, or 50 on a CPU)",
    )
    parser.add_argument(
        "--task-context",
        type=int,
        metavar="N",
        help="tokens of the longest example of a generated task (default: 2048, or the longest of --contexts)",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        metavar="N",
        help="lengths in tokens at which speed and memory are measured, or none (default: some that suit the device)",
    )
    parser.add_argument(
        "--parts",
        default="layers",
        metavar="WHICH",
        help="parts that are switched off to see what they carry, with a text: those of every layer (layers, default; "
        "minutes for a deep model), those of all delta-rule layers at once (kinds), or none",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto (the checkpoint's, float32 on a CPU), float32, bfloat16, float16",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="folder for evaluation.html, .md and .json, which are replaced there"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def eval_main(argv: Sequence[str] | None = None) -> int:
    def call(arguments: argparse.Namespace) -> None:
        from distill.evaluation.command import run

        run(arguments)

    return _run(eval_parser(), argv, call)
