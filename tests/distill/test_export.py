"""The export of a run: everything a reader needs, whole by the same checks as a conversion, and sent where asked."""

import json

import pytest
from huggingface_hub import snapshot_download
from loopback_hub import hub
from published import files_of
from safetensors.torch import load_file
from small_run import write_recipe, write_teacher

from convert import convert
from convert.publish.manifest import damage
from convert.publish.verify import verify
from deltanet_errors import UserError
from distill.dry_run import describe
from distill.export import add_reports, check_push, export
from distill.recipe import load_recipe
from distill.run import distil

__all__ = ["hub"]
REPORT = {
    "results": [{"model": "teacher", "perplexity": 4.0}, {"model": "after distil", "perplexity": 5.0, "kl": 0.25}],
    "tokens": 10,
    "held_out_tokens": 20,
    "export": "/home/me/run/export",
}
RECIPE = "version: 1\ndata: {sources: [{path: books.txt}]}\n"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    teacher = write_teacher(folder / "teacher")
    (teacher / "LICENSE").write_text("MIT License\n\nCopyright (c) nobody\n")
    convert(teacher, folder / "student", hybrid="layers:1", calibrate=["none"])
    return folder / "student"


def test_an_export_passes_every_check_and_holds_records_recipe_report_card_and_manifest(student, tmp_path):
    out = tmp_path / "export"
    export(student, student, out, max_shard_size="100KB", recipe=RECIPE, report=REPORT)
    assert verify(out).problems == []
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "manifest.json", "conversion.json", "report.json", "deltanet_recipe.yaml", "LICENSE"} <= names
    assert {"generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert (out / "deltanet_recipe.yaml").read_text() == RECIPE
    told = json.loads((out / "report.json").read_text())
    assert told["results"] == REPORT["results"]
    assert "export" not in told
    card = (out / "README.md").read_text()
    assert "| after distil | 5 | 1.25 | 0.2500 |" in card
    assert "license: mit" in card


def test_weights_are_those_of_the_student_in_the_dtype_asked_for(student, tmp_path):
    export(student, student, tmp_path / "same", recipe=RECIPE)
    same, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "same", student))
    assert all((same[name] == own[name]).all() for name in own)
    export(student, student, tmp_path / "half", dtype="bfloat16", recipe=RECIPE)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(tmp_path / "half").problems == []


def test_reports_made_later_join_the_export_its_card_and_its_manifest(student, tmp_path):
    out = tmp_path / "export"
    export(student, student, out, recipe=RECIPE, report=REPORT)
    tasks = {"recall": {"accuracy": 0.75, "stderr": 0.03, "n": 200}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    (tmp_path / "evaluation.md").write_text("# Evaluation\n")
    add_reports(out, [tmp_path / "evaluation.json", tmp_path / "evaluation.md"])
    assert damage(out) == []
    assert "| recall | 200 | - | 0.750 ± 0.030 |" in (out / "README.md").read_text()


def test_a_push_that_cannot_work_is_refused_before_training(monkeypatch, tmp_path):
    from huggingface_hub import constants

    check_push(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="not a repository; write user/name"):
        check_push("nonsense")
    with pytest.raises(UserError, match="no token for the Hub"):
        check_push("user/name")
    monkeypatch.setenv("HF_TOKEN", "hf_something0123456789")
    check_push("user/name")


def test_a_recipe_that_asks_for_it_ends_on_the_hub_and_what_is_pulled_has_the_same_bytes(hub, tmp_path, capfd):
    recipe = write_recipe(
        tmp_path / "r.yaml", write_teacher(tmp_path / "teacher"), stages=[{"kind": "distil", "steps": 2}]
    )
    distil(recipe, ["export.push=tester/small", "evaluation.tasks=[]"], output=tmp_path / "run")
    out = tmp_path / "run" / "export"
    assert verify(out).problems == []
    snapshot_download("tester/small", local_dir=tmp_path / "pulled")
    pulled = {name: data for name, data in files_of(tmp_path / "pulled").items() if not name.startswith(".")}
    assert pulled == files_of(out)
    assert hub.repositories["tester/small"].private
    said = capfd.readouterr()
    assert f"pushed   {hub.url}/tester/small" in said.out
    written = [data for data in files_of(tmp_path / "run").values() if hub.token.encode() in data]
    assert not written
    assert hub.token not in said.out + said.err
    report = json.loads((out / "report.json").read_text())
    assert f"| after distil | {report['results'][-1]['perplexity']:.4g} |" in (out / "README.md").read_text()


def test_a_recipe_whose_push_cannot_work_trains_nothing(hub, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", write_teacher(tmp_path / "teacher"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token for the Hub"):
        distil(recipe, ["export.push=tester/small"], output=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


def test_a_run_writes_every_format_that_the_recipe_names_beside_its_export(tmp_path, capfd):
    teacher = write_teacher(tmp_path / "teacher")
    recipe = write_recipe(
        tmp_path / "r.yaml",
        teacher,
        stages=[{"kind": "distil", "steps": 2}],
        student__convert={"hybrid": "layers:1", "calibrate": "none", "compat": "fla"},
        export__formats=["deltanet", "remote", "fla"],
    )
    distil(recipe, [], output=tmp_path / "run")
    said = capfd.readouterr().out
    for name, loads in (("remote", "trust_remote_code=True"), ("fla", "import fla")):
        out = tmp_path / "run" / f"export-{name}"
        assert verify(out).problems == []
        assert loads in (out / "README.md").read_text()
        assert f"export   {out}" in said
    assert "import deltanet" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_a_format_that_the_student_cannot_have_is_refused_before_it_is_made(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", write_teacher(tmp_path / "teacher"), export__formats=["fla"])
    refused = r"export\.formats: fla: the format cannot express .*skip_taps 4"
    with pytest.raises(UserError, match=refused):
        describe(load_recipe(recipe), tmp_path / "cache")
    with pytest.raises(UserError, match=refused):
        distil(recipe, [], output=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


def test_a_mixer_option_against_compat_is_refused_in_a_recipe_too(tmp_path):
    mixer = {"hybrid": "none", "compat": "fla", "gate": "read"}
    recipe = write_recipe(tmp_path / "r.yaml", write_teacher(tmp_path / "teacher"), student__convert=mixer)
    with pytest.raises(UserError, match="--compat fla needs --gate none"):
        load_recipe(recipe)
    assert load_recipe(recipe, ["student.convert.gate=none"]).student.convert.skip_conv == 0
