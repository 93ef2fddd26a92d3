"""The commands: help is instant, versions print, errors are one line with the documented exit code."""

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "deltanet-convert": cli.convert_main,
    "deltanet-distill": cli.distill_main,
    "deltanet-generate": cli.generate_main,
    "deltanet-eval": cli.eval_main,
    "deltanet-push": cli.push_main,
}


def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
    code = f"import sys, cli; sys.exit(cli.{command.removeprefix('deltanet-')}_main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_half_a_second_without_torch(command):
    code = (
        f"import sys, cli\ntry: cli.{command.removeprefix('deltanet-')}_main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    fastest = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        fastest = min(fastest, time.perf_counter() - start)
    assert done.stderr.strip() == "False False"
    assert "example" in done.stdout
    assert fastest < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_version_names_what_matters(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command](["--version"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith(f"{command} 0.")
    assert "torch" in out
    assert "transformers" in out


@pytest.mark.parametrize(("source", "words"), [(ROOT, "0."), (Path("absent"), "of unknown version")])
def test_version_is_told_where_the_project_runs_from_its_folder(source, words, monkeypatch, capsys):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr(cli, "__file__", str(source / "cli.py"))
    with pytest.raises(SystemExit) as stopped:
        cli.eval_main(["--version"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith(f"deltanet-eval {words}")
    assert "torch not installed" in out


def test_generate_refuses_what_is_no_checkpoint_in_one_line(tmp_path):
    done = run("deltanet-generate", str(tmp_path), "hello")
    assert done.returncode == 2
    assert done.stderr.strip() == f"deltanet-generate: {tmp_path}: not a checkpoint folder (no config.json)"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "2"), ("--dtype", "bfloat"), ("--device", "gpu")],
)
def test_generate_names_the_option_that_is_out_of_range(option, value, capsys, tmp_path):
    assert cli.generate_main([str(tmp_path), "hello", option, value]) == 2
    assert option in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_exit_code_1(capsys, monkeypatch):
    import deltanet.generate

    def fail(**options):
        raise RuntimeError("it broke")

    monkeypatch.setattr(deltanet.generate, "generate", fail)
    assert cli.generate_main(["demo", "hello"]) == 1
    assert capsys.readouterr().err == "deltanet-generate: RuntimeError: it broke (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="it broke"):
        cli.generate_main(["demo", "hello", "--debug"])


def test_generate_takes_what_convert_takes(capsys, tmp_path):
    assert cli.generate_main(["demo", "Once upon a time", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert cli.generate_main(["demmo", "hello"]) == 2
    assert "demmo: no such folder, and no preset (did you mean 'demo'?)" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(capsys, monkeypatch):
    import deltanet.generate

    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(deltanet.generate, "generate", interrupt)
    assert cli.generate_main(["demo", "hello"]) == 130
    assert "Ctrl-C" in capsys.readouterr().err


def test_generate_continues_a_prompt(tmp_path, capsys):
    """A tiny student with the embedded teacher's tokenizer: text streams, and the seed decides it."""
    from importlib.resources import files
    from shutil import copy

    import torch

    from deltanet import DeltaNetConfig, DeltaNetForCausalLM

    demo = Path(str(files("recipes") / "demo"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(demo / name, tmp_path)
    torch.manual_seed(0)
    config = DeltaNetConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    DeltaNetForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()  # transformers may import DeepSpeed to save, which speaks on standard output
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--max-new-tokens", "12", "--temperature", "1", "--seed", seed, "--device", "cpu"]
        assert cli.generate_main([str(tmp_path), "Once upon a time", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Once upon a time")
    assert texts[0] == texts[1] != texts[2]
