"""The commands: help is instant, versions print, errors are one line with the documented exit code."""

import io
import json
import os
import re
import shutil
import signal
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


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("convert", ["demo", "-o", ""], "--output"),
        ("convert", ["", "--verify"], "SOURCE"),
        ("generate", ["", "hello"], "MODEL"),
        ("push", ["", "user/name"], "FOLDER"),
        ("eval", ["student", "--against", ""], "--against"),
        ("distill", [""], "RECIPE"),
        ("distill", ["quickstart", "-o", ""], "--output"),
    ],
)
def test_an_empty_name_is_not_the_current_folder(command, arguments, name, capsys):
    with pytest.raises(SystemExit, match="2"):
        COMMANDS[f"deltanet-{command}"](arguments)
    assert capsys.readouterr().err == f"deltanet-{command}: {name}: is empty (--help lists the options)\n"


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


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["quickstart", "trainig.batch_size=3"], 2, "unknown key (did you mean 'training'?)"),
        (["quickstart", "training.batch_size=many"], 2, "expected a whole number"),
        (["quickstart", "training.batch_size"], 2, "is not key.path=value"),
        (["quickstart", "training.micro_batch_size=3"], 2, "is no multiple of a micro-batch of 3"),
        (["quickstart", "stages.0.sources=[books]", "--dry-run"], 2, "'books' is no source"),
        (["quickstart", "student.convert.compat=fla", "student.convert.gate=read"], 2, "--compat fla needs"),
        (["mqar", "data.sources.0.options.pears=3"], 2, "no option 'pears'"),
        (["absent.yaml"], 2, "no such file"),
        (["twice.yaml"], 2, "the key is there twice"),
        (["quickstart", "data.sources=[{path: absent.txt}]"], 2, "source absent: absent.txt: no such file"),
        (["quickstart", "evaluation.sources=[{path: absent.txt}]", "--dry-run"], 2, "absent.txt: no such file"),
        (["quickstart", "student.convert.calibrate=absent.txt"], 2, "student.convert.calibrate: absent.txt: no such"),
        (["quickstart", "-o", "twice.yaml"], 2, "-o twice.yaml: twice.yaml is a file, not a folder"),
        (["quickstart", "-o", "twice.yaml", "--dry-run"], 2, "-o twice.yaml: twice.yaml is a file, not a folder"),
        (["quickstart", "--resume", "absent"], 2, "--resume absent: no such commit; say auto, never or a folder in"),
        (["quickstart", "--resume", "absent", "--dry-run"], 2, "--resume absent: no such commit; say auto, never"),
        (["quickstart", "--print-config"], 0, "micro_batch_size: "),
        (["mqar", "--print-config"], 0, "micro_batch_size: "),
    ],
)
def test_a_recipe_is_checked_and_printed_without_torch(arguments, exit_code, words, tmp_path):
    (tmp_path / "twice.yaml").write_text("version: 1\nversion: 1\n")
    code = (
        "import sys, cli\ndone = cli.distill_main(sys.argv[1:])\n"
        "print(done, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    *printed, facts = done.stdout.splitlines()
    assert facts == f"{exit_code} False False", done.stderr
    assert words in "\n".join([*printed, done.stderr])
    assert len(done.stderr.splitlines()) == (exit_code > 0)
    assert sorted(os.listdir(tmp_path)) == ["twice.yaml"]


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
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--top-p", "2"),
        ("--top-p", ".9"),  # of a greedy run
        ("--top-k", "40"),
        ("--repetition-penalty", "1e-300"),
        ("--dtype", "bfloat"),
        ("--device", "gpu"),
        ("--device", "meta"),
    ],
)
def test_generate_names_the_option_that_is_out_of_range(option, value, capsys, tmp_path):
    assert cli.generate_main([str(tmp_path), "hello", option, value]) == 2
    assert option in capsys.readouterr().err


def test_generate_takes_no_token_of_a_model_whose_logits_are_not_numbers(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for path in (ROOT / "recipes" / "demo").iterdir():
        shutil.copy(path, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert cli.generate_main([str(tmp_path), "Once"]) == 2
    assert "the model's logits are not numbers" in capsys.readouterr().err
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert cli.generate_main([str(tmp_path), "Once"]) == 2
    assert f"{tmp_path}: has no tokenizer (none of tokenizer.json, " in capsys.readouterr().err


@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
def test_an_unexpected_error_is_one_line_and_exit_code_1(kind, capsys, monkeypatch):
    import deltanet.generate

    def fail(**options):
        raise kind("it broke")

    monkeypatch.setattr(deltanet.generate, "generate", fail)
    assert cli.generate_main(["demo", "hello"]) == 1
    assert capsys.readouterr().err == f"deltanet-generate: {kind.__name__}: it broke (--debug shows where)\n"
    with pytest.raises(kind, match="it broke"):
        cli.generate_main(["demo", "hello", "--debug"])


def test_generate_names_the_folder_of_a_student_that_is_out_of_range(tmp_path, capsys):
    from deltanet import DeltaNetConfig

    DeltaNetConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"mixer": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.generate_main([str(tmp_path), "hello", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"deltanet-generate: {tmp_path}: cannot be loaded: config.mixer is 'x'; allowed: gated_delta" in error


@pytest.mark.parametrize("secret", ["hf_AAAAdummy", "https://user:pw@host/model", "plain-word-secret"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("convert", ["{}", "-o", "student"]),
        ("convert", ["demo", "-o", "student", "--hybrid", "{}"]),
        ("convert", ["demo", "-o", "student", "--calibrate", "{}"]),
        ("convert", ["demo", "-o", "student", "--token", "{}"]),
        ("convert", ["demo", "-o", "student", "--seed", "{}"]),
        ("push", ["demo", "{}"]),
        ("eval", ["demo", "--text", "{}"]),
        ("generate", ["{}", "hello"]),
        ("distill", ["{}"]),
        ("distill", ["quickstart", "--resume", "{}"]),
    ],
)
def test_a_secret_among_the_arguments_is_not_repeated(command, arguments, secret, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-word-secret")
    try:
        code = getattr(cli, f"{command}_main")([argument.format(secret) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    told = "".join(capsys.readouterr())
    assert code == 2
    assert "***" in told
    assert secret not in told
    assert ":pw" not in told


def test_what_is_wrong_with_a_path_is_wrong_input(capsys):
    assert cli.generate_main(["x" * 300, "hello"]) == 2
    assert capsys.readouterr().err == f"deltanet-generate: {'x' * 300}: File name too long\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--skip-conv", "x"], "argument --skip-conv: invalid int value: 'x'"),
        (["--seed", "1" + "0" * 30], "argument --seed: '1" + "0" * 30 + "' is not a whole number from 0 to 2^63 - 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number"),
        (["--seed", "9" * 5000], f"argument --seed: '{'9' * 5000}' is not a whole number"),
        (["--nix"], "unrecognized arguments: --nix"),
    ],
)
def test_an_option_that_cannot_be_read_is_one_line(options, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.convert_main(["demo", "-o", "student", *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deltanet-convert: {says}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"num_hidden_layers": 7}, "the weights do not fit the configuration: missing: model.layers.6"),
        ("config.json", {"num_hidden_layers": 5}, "the weights do not fit the configuration: unexpected"),
        ("config.json", {"vocab_size": 1000}, r"embed_tokens.weight is \[1024, 192\] and not \[1000, 192\]"),
        ("config.json", {"vocab_size": 10**13}, "it makes .* numbers"),
        ("config.json", {"vocab_size": "x"}, "'vocab_size': TypeError: Field 'vocab_size' expected int, got str"),
        ("config.json", {"hidden_act": "x"}, "cannot be loaded: KeyError: 'x'"),
        ("tokenizer.json", {"added_tokens": 3}, "unreadable tokenizer"),
        ("tokenizer.json", None, "unreadable tokenizer"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "the chat template fails: Expected an expression"),
        ("generation_config.json", None, "cannot be loaded"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong_with_a_folder(name, changes, says, tmp_path, capsys):
    from importlib.resources import files
    from shutil import copytree

    folder = copytree(str(files("recipes") / "demo"), tmp_path / "teacher")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text("[]" if changes is None else json.dumps(content | changes))
    options = ["--chat"] if name == "tokenizer_config.json" else []
    assert cli.generate_main([str(folder), "Once", "--device", "cpu", *options]) == 2
    out, error = capsys.readouterr()
    message = [line for line in error.splitlines() if line.startswith("deltanet-generate: ")]
    assert len(message) == 1
    assert re.search(says, message[0])
    assert message[0].startswith(f"deltanet-generate: {folder}")
    assert out == ""


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_standard_input_that_gives_no_text_is_wrong_input(content, capsys, monkeypatch):
    stdin = None if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.generate_main(["demo", "-", "--device", "cpu"]) == 2
    assert ("standard input is closed" if content is None else "not UTF-8") in capsys.readouterr().err


def test_generate_is_not_led_by_what_its_folder_says_of_sampling(tmp_path, capsys):
    from importlib.resources import files
    from shutil import copytree

    folder, texts = copytree(str(files("recipes") / "demo"), tmp_path / "teacher"), []
    path = folder / "generation_config.json"
    odd = {"num_return_sequences": 3, "max_length": 5, "num_beams": 3, "penalty_alpha": 0.6, "top_k": 4}
    for settings in ({}, odd):
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        assert cli.generate_main([str(folder), "Once upon", "--max-new-tokens", "8", "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_prompt_beyond_the_range_of_the_model_is_noted(capsys):
    assert cli.generate_main(["demo", "word " * 300, "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert "note: the prompt has 602 tokens; the model is made for 512\n" in capsys.readouterr().err


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_that_is_ended_leaves_nothing_half_written(number, capsys, monkeypatch, tmp_path):
    import convert.command

    monkeypatch.setattr(convert.command, "write_small", lambda *_: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)  # what nohup has a process ignore, it goes on ignoring
    try:
        assert cli.convert_main(["demo", "-o", str(tmp_path / "student"), "--calibrate", "none"]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"deltanet-convert: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


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
