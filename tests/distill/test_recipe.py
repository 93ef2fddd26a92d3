"""Laws of recipes: each mistake is one line with its place, overrides obey the same rules, secrets never get out."""

import json
import os
import re
from pathlib import Path

import pytest

from deltanet_errors import UserError
from distill.recipe import changes, json_schema, load_recipe, parse_recipe, recipes_folder, show
from distill.redact import mask, names_a_secret
from distill.schema import DEFAULTS_OF, KINDS, LOSSES_OF, Stage

ROOT = Path(__file__).parent.parent.parent
TEXT = """version: 1
teacher:
  model: demo
student:
  convert:
    hybrid: global2
data:
  sources:
    - path: stories.jsonl
stages:
  - kind: align
    steps: 10
  - kind: distil
    tokens: 100000
    lr: 1e-4
training:
  batch_size: 8
  micro_batch_size: 2
"""


def parse(old="", new="", *overrides):
    assert old in TEXT
    return parse_recipe(TEXT.replace(old, new, 1), "r.yaml", overrides)


def test_defaults_by_kind_are_filled_in():
    recipe = parse()
    align, distil = recipe.stages
    assert (align.name, align.trainable, align.lr) == ("align", ("mixers",), 1e-3)
    assert [loss.name for loss in align.losses] == ["mixer_l2"]
    assert (distil.name, distil.trainable, distil.lr) == ("distil", ("all",), 1e-4)
    assert [loss.name for loss in distil.losses] == ["forward_kl"]
    assert recipe.data.sources[0].name == "stories"
    assert [stage.name for stage in parse("kind: distil", "kind: align").stages] == ["align", "align2"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1e-4", "lr: abc", "r.yaml:15 stages.1.lr: got 'abc' (text), expected a number"),
        ("lr: 1e-4", "lr: '1e-4'", "r.yaml:15 stages.1.lr: got '1e-4' (text), expected a number"),
        ("lr: 1e-4", "lr: true", "r.yaml:15 stages.1.lr: got true, expected a number"),
        ("lr: 1e-4", "lr: .nan", "r.yaml:15 stages.1.lr: .nan is not a finite number"),
        ("lr: 1e-4", "lr: -1", "r.yaml:15 stages.1.lr: got -1, expected a number at least 0"),
        ("lr: 1e-4", "lr: 1\n    lr: 2", "r.yaml:16 stages.1.lr: the key is there twice, first in line 15"),
        ("lr: 1e-4", "warmup_step: 4", "r.yaml:15 stages.1.warmup_step: unknown key (did you mean 'warmup_steps'?); "),
        ("kind: distil", "kind: distill", "r.yaml:13 stages.1.kind: got 'distill' (text), allowed: align, distil, "),
        ("kind: distil", "kind: distill", "(did you mean 'distil'?)"),
        ("kind: distil", "kind: calibrate", "r.yaml:13 stages.1.kind: calibration is no stage: `student.convert` does"),
        ("steps: 10", "steps: 10.5", "r.yaml:12 stages.0.steps: got 10.5, expected a whole number"),
        ("steps: 10", "steps: yes", "r.yaml:12 stages.0.steps: got 'yes' (text), expected a whole number"),
        ("steps: 10", "steps: 0", "r.yaml:12 stages.0.steps: got 0, expected a number above 0"),
        ("steps: 10", "steps: 10\n    tokens: 5", "r.yaml:11 stages.0: say `steps:` or `tokens:`, one of them"),
        ("    steps: 10\n", "", "r.yaml:11 stages.0: say `steps:` or `tokens:`, one of them"),
        ("steps: 10", "steps: 3\n    warmup_steps: 4", "r.yaml:13 stages.0.warmup_steps: 4 is more than the stage's 3"),
        ("steps: 10", "steps: 1\n    losses: [{name: ce}]", "r.yaml:13 stages.0.losses.0.name: 'ce' is no loss"),
        (
            "lr: 1e-4",
            "losses: [{name: ce}, {name: forward_kl, temperature: 1}, {name: forward_kl, temperature: 2}]",
            "r.yaml:15 stages.1.losses.2.name: 'forward_kl' is there twice; the metrics have one column of a name",
        ),
        ("steps: 10", "steps: 1\n    sources: [storys]", "'storys' is no source; allowed: stories (did you mean"),
        ("lr: 1e-4", "hybrid: none", "r.yaml:15 stages.1.hybrid: a distil stage has no such key; allowed: name, kind,"),
        ("lr: 1e-4", "prompt_tokens: 4", "r.yaml:15 stages.1.prompt_tokens: a distil stage has no such key; allowed: "),
        ("version: 1", "version: 2", "r.yaml:1 version: got 2, allowed: 1"),
        ("version: 1\n", "", "r.yaml:1 version: missing"),
        ("teacher:\n  model: demo", "teacher: demo", "r.yaml:2 teacher: got 'demo' (text), expected a mapping"),
        ("  model: demo\n", "", "stages.0.kind: a stage of kind align needs a `teacher:`"),
        ("model: demo", "modell: demo", "r.yaml:3 teacher.modell: unknown key (did you mean 'model'?)"),
        ("  convert:\n    hybrid: global2\n", "  model: null\n", "r.yaml:4 student: say `model:`"),
        ("hybrid: global2", "mixer: gated", "allowed: gated_delta, delta (did you mean 'gated_delta'?)"),
        ("- path: stories.jsonl", "- kind: chat", "r.yaml:9 data.sources.0: say `path:` (local files), `dataset:`"),
        ("- path: stories.jsonl", "- {path: a.txt, weight: 1}\n    - {path: b.txt}", "every source a weight, or none"),
        ("- path: stories.jsonl", "- {path: a.txt}\n    - {path: b/a.txt}", "data.sources.1.name: 'a' names two"),
        ("sources:\n    - path: stories.jsonl", "sources: []", "r.yaml:8 data.sources: no source of text"),
        ("batch_size: 8", "batch_size: 9", "r.yaml:17 training.batch_size: a batch of 9 sequences is no multiple"),
        ("hybrid: global2", "hybrid: ''", "r.yaml:6 student.convert.hybrid: got '' (text), expected text that"),
        ("hybrid: global2", "calibrate: []", "student.convert.calibrate: got an empty list, expected at least one"),
        ("hybrid: global2", "beta_range: true", "student.convert.beta_range: got true, expected a whole number"),
        ("hybrid: global2", "max_shard_size: 5XB", "student.convert.max_shard_size: got 5XB: not a size; write it"),
        ("model: demo", "model: ''", "r.yaml:3 teacher.model: got '' (text), expected text that is not"),
        ("model: demo", "model: demo\n  revision: main", "r.yaml:4 teacher.revision: got 'main', but demo is local"),
        ("stories.jsonl", "[]", "r.yaml:9 data.sources.0.path: got an empty list, expected at least one"),
        ("stories.jsonl", "a.txt\n      separator: ''", "data.sources.0.separator: got '' (text), expected text that"),
        ("stories.jsonl", "a.txt\n      top_p: 0.9", "sources.0.top_p: `top_p:` belongs to `from_teacher:`"),
        ("stories.jsonl", "a.txt\n      openings: [A]", "sources.0.openings: `openings:` belongs to `from_teacher:`"),
        ("stories.jsonl", "a.txt\n      split: test", "r.yaml:10 data.sources.0.split: `split:` belongs to `dataset:`"),
        ("lr: 1e-4", "trainable: []", "r.yaml:15 stages.1.trainable: got an empty list, expected at least one"),
        ("lr: 1e-4", "lora: {targets: []}", "stages.1.lora.targets: got an empty list, expected at least one"),
        ("lr: 1e-4", f"name: {'n' * 201}", "begins with no '.', has no '/' in it and at most 200 bytes"),
        ("lr: 1e-4", "name: a/b", "r.yaml:15 stages.1.name: got 'a/b', but a stage's name is no number"),
        ("training:", "evaluation: {prompt: ''}\ntraining:", "r.yaml:16 evaluation.prompt: got '' (text), expected"),
        ("training:", "export: {max_shard_size: 0GB}\ntraining:", "export.max_shard_size: got 0GB: not a size"),
        ("training:", "deepspeed: {stage: true}\ntraining:", "deepspeed.stage: got true, expected a whole number"),
        ("training:", "deepspeed:\n  stage: 4\ntraining:", "r.yaml:17 deepspeed.stage: got 4, allowed: 0, 1, 2, 3"),
        ("training:", "deepspeed:\n  extra: {fp16: 1}\ntraining:", "deepspeed.extra.fp16: decided by training.dtype"),
        ("training:", "deepspeed:\n  offload_parameters: cpu\ntraining:", "needs deepspeed.stage 3"),
        ("training:", "deepspeed:\n  stage: 3\ntraining:\n  compile: true", "compile: needs deepspeed.stage 0, 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_place(old, new, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse(old, new)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("r.yaml:")


def test_the_teacher_does_not_write_the_same_text_for_training_and_for_evaluation():
    train, held = "data.sources=[{from_teacher: 500}]", "evaluation.sources=[{from_teacher: 100}]"
    recipe = parse("", "", train, held)
    assert [recipe.data.sources[0].name, recipe.evaluation.sources[0].name] == ["teacher", "evaluation"]
    with pytest.raises(UserError, match=r"evaluation.sources.0.name: 'teacher' is the very text that the stages train"):
        parse("", "", train, held, "evaluation.sources.0.name=teacher")


@pytest.mark.parametrize(
    ("source", "other", "message"),
    [
        (
            "dataset: owner/texts",
            "split: test",
            "dataset: 'owner/texts' is the very text that the stages train on; say",
        ),
        ("task: mqar, documents: 9", "seed: 1", "seed: 0 is the very text that the stages train on; give it a seed"),
    ],
)
def test_what_is_trained_on_is_not_held_out(source, other, message):
    train = f"data.sources=[{{path: a.txt}}, {{name: x, {source}}}]"
    parse("", "", train, f"evaluation.sources=[{{{source}, {other}}}]")
    with pytest.raises(UserError, match=rf"evaluation\.sources\.0\.{message}"):
        parse("", "", train, f"evaluation.sources=[{{{source}}}]")


def test_an_option_of_a_task_at_its_usual_value_makes_no_other_text():
    train = "data.sources=[{task: mqar, documents: 9, options: {length: 32, pairs: 8}}]"
    held = "evaluation.sources=[{task: mqar, documents: 9, options: {length: 32, pairs: 8, power: 0.01}}]"
    with pytest.raises(UserError, match=r"seed: 0 is the very text that the stages train on; give it a seed"):
        parse("", "", train, held)


def test_a_source_that_no_stage_reads_or_another_field_of_one_may_be_measured_on():
    train = "data.sources=[{name: a, path: a.txt}, {name: b, task: mqar, documents: 9}, {dataset: o/t, field: de}]"
    stage = "stages=[{kind: distil, steps: 1, sources: [a, t]}]"
    parse("", "", train, stage, "evaluation.sources=[{task: mqar, documents: 9}, {dataset: o/t, field: en}]")


def test_sources_of_two_names_are_not_written_into_the_same_files():
    two = "data.sources=[{from_teacher: 5, name: x, top_p: 0.9}, {from_teacher: 5, name: %s}]"
    parse("", "", two % "x-top-0.95")
    with pytest.raises(
        UserError, match=r"sources\.1\.name: its files would be called x-top-0\.9, as those of 'x'; give"
    ):
        parse("", "", two % "x-top-0.9")


def test_sequences_are_not_parted_over_processes():
    with pytest.raises(UserError, match=r"extra\.sequence_parallel_size: decided by the number of processes, each of"):
        parse("", "", "deepspeed.extra={sequence_parallel_size: 2}")


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".hidden"])
def test_the_name_of_what_the_teacher_writes_stays_in_its_folder(name):
    with pytest.raises(UserError, match=rf"data\.sources\.0\.name: got '{re.escape(name)}', but files are called so"):
        parse("", "", f"data.sources=[{{from_teacher: 500, name: {name}}}]")


def test_a_chat_has_no_prompt_where_all_of_it_is_a_target():
    own = ("data.sources.0.kind=chat", "stages.1={kind: onpolicy, steps: 1}")
    parse("", "", *own)
    parse("", "", own[1], "data.train_on=all")
    with pytest.raises(UserError, match=r"stages\.1\.kind: .* is nothing with data\.train_on all"):
        parse("", "", *own, "data.train_on=all")


def test_a_weight_that_gets_no_sequence_of_a_stage_is_refused_with_its_source():
    two = "data.sources=[{path: a.txt, weight: %s}, {path: b.txt, weight: 1000}]"
    parse("", "", two % 1)
    parse("", "", two % 0.1, "stages.0.sources=[a]", "stages.1.sources=[b]")
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.weight: 0\.1 is below 1/1024 of what stage distil reads, which"
    ):
        parse("", "", two % 0.1, "stages.0.sources=[a]")


def test_the_first_mistake_of_several_is_told_with_their_number():
    with pytest.raises(UserError, match=r"^r.yaml:4 x: unknown key; .* \(and 2 more\)$"):
        parse_recipe(
            TEXT.replace("steps: 10", "steps: a").replace("1e-4", "b").replace("model: demo", "model: demo\nx: 1"),
            "r.yaml",
        )


def test_a_recipe_without_stages_is_refused():
    with pytest.raises(UserError, match=r"^command line stages: no stage to run$"):
        parse("", "", "stages=[]")


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(text):
    with pytest.raises(UserError, match=r"^r.yaml: got .*; a recipe is a mapping with the keys version, teacher"):
        parse_recipe(text, "r.yaml")


@pytest.mark.parametrize(
    ("old", "new", "override", "message"),
    [
        ("", "", "data.sources.1.seed=1", "data.sources.1.seed: '1' is none of 0, stories"),
        ("- path: stories.jsonl", "- seed: 1", "data.sources.x.seed=1", "data.sources.x.seed: 'x' is none of 0"),
        ("", "", "data.sources.chats.seed=1", "data.sources.chats.seed: 'chats' is none of 0, stories"),
        ("kind: distil", "kind: align", "stages.align3.lr=1", "'align3' is none of 0, 1, align, align2 (did you mean"),
        ("", "", "stages.distil.losses.0.name=forwardkl", "losses.0.name: got 'forwardkl' (text), allowed: mixer_l2,"),
        ("", "", "stages.distil.losses.1.weight=2", "stages.distil.losses.1.weight: '1' is none of 0, forward_kl"),
    ],
)
def test_an_override_names_what_there_is(old, new, override, message):
    with pytest.raises(UserError, match=f"^command line .*{re.escape(message)}(?!.*None)"):
        parse(old, new, override)


def test_an_override_that_is_no_yaml_has_no_line_but_may_begin_with_the_folder_of_the_recipes():
    with pytest.raises(UserError, match=r"^command line training.seed: not YAML: "):
        parse("", "", "training.seed=[1")
    with pytest.raises(UserError, match=r"^command line training.seed: the key is there twice$"):
        parse("", "", "training={seed: 1,\nseed: 2}")
    recipe = parse("", "", "data.sources.0.path={recipes}/demo/text.txt")
    assert recipe.data.sources[0].path == (str(recipes_folder() / "demo" / "text.txt"),)


def test_an_override_finds_what_is_called_so_by_default():
    recipe = parse("", "", "data.sources.stories.max_documents=7", "stages.distil.losses.forward_kl.weight=2")
    assert recipe.data.sources[0].max_documents == 7
    assert [(loss.name, loss.weight) for loss in recipe.stages[1].losses] == [("forward_kl", 2)]
    assert parse("kind: distil", "kind: align", "stages.align2.lr=7").stages[1].lr == 7


def test_of_several_overrides_the_one_is_blamed_that_did_it_and_none_for_what_the_file_says():
    wrong = "training.micro_batch_size=3"
    with pytest.raises(UserError, match=r"^command line training.micro_batch_size: training.batch_size: a batch of 8"):
        parse("", "", "stages.0.lr=1e-5", wrong, "training.seed=2")
    with pytest.raises(UserError, match=r"^r.yaml:17 training.batch_size: a batch of 9"):
        parse("batch_size: 8", "batch_size: 9", "stages.0.lr=1e-5", "training.seed=2")


def test_overrides_change_keys_by_place_and_by_name():
    recipe = parse("", "", "stages.distil.lr=1e-5", "stages.0.steps=7", "data.repeats=0.3", "logging.wandb=true")
    assert (recipe.stages[1].lr, recipe.stages[0].steps, recipe.data.repeats) == (1e-5, 7, 0.3)
    assert recipe.logging.wandb
    recipe = parse("", "", "deepspeed.extra.zero_optimization.overlap_comm=false", "training.seed=1", "training.seed=2")
    assert recipe.deepspeed.extra == {"zero_optimization": {"overlap_comm": False}}
    assert recipe.training.seed == 2
    assert parse("", "", "stages=[{kind: sft, steps: 3}]").stages[0].kind == "sft"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=1", "command line training.lr: unknown key; allowed: batch_size"),
        ("training.seed=x", "command line training.seed: got 'x' (text), expected a whole number"),
        (f"training.seed=0x{'f' * 4000}", f"command line training.seed: '0x{'f' * 38}...' is not a whole number of 64"),
        (f"stages.{'9' * 5000}.lr=1", "command line stages.99"),
        (f"{'a.' * 599}a=1", f"command line {'a.' * 20}...: nested too deep; allowed are 100 keys"),
        (f"{'a.' * 599}a={{recipes}}/x", f"command line {'a.' * 20}...: nested too deep; allowed are 100 keys"),
        (f"deepspeed.extra.{'a.' * 60}a={'{a: ' * 60}1{'}' * 60}", "command line deepspeed.extra.a.a.a"),
        ("stages.0.lr=.inf", "command line stages.0.lr: .inf is not a finite number"),
        ("stages.distill.lr=1", "command line stages.distill.lr: 'distill' is none of 0, 1, align, distil (did"),
        ("stages.2.lr=1", "command line stages.2.lr: '2' is none of 0, 1, align, distil"),
        ("training.seed", "command line: 'training.seed' is not key.path=value"),
        ("--training.seed=1", "command line: '--training.seed=1' is not key.path=value"),
        ("teacher.model.x=1", "command line teacher.model.x: teacher.model is a plain value, it has no 'x'"),
        ("stages.1={kind: distil, steps: 1, lrr: 2}", "command line stages.1.lrr: unknown key"),
        ("training.batch_size=3", "command line training.batch_size: a batch of 3 sequences is no multiple"),
        ("stages.align.micro_batch_size=5", "command line stages.0.micro_batch_size: a batch of 8 sequences is no"),
        ("deepspeed.offload_parameters=cpu", "command line deepspeed.offload_parameters: needs deepspeed.stage 3"),
        ("student.convert=null", "command line student.convert: student: say `model:`"),
    ],
)  # fmt: skip
def test_overrides_obey_the_same_rules(override, message):
    with pytest.raises(UserError) as caught:
        parse("", "", override)
    assert str(caught.value).startswith(message)


def test_what_is_shown_loads_to_the_same_recipe():
    recipe = parse("", "", "stages.0.lr_groups={mixers: 1e-3}", "evaluation.prompt='1e-5'")
    again = parse_recipe(show(recipe), "shown.yaml")
    assert again == recipe


def test_what_is_shown_names_no_folder_of_the_machine_for_a_shipped_file():
    recipe = load_recipe("quickstart")
    assert recipe.evaluation.sources[0].path == (f"{recipes_folder()}/demo/text.txt",)
    assert "{recipes}/demo/text.txt" in show(recipe)
    assert str(recipes_folder()) not in show(recipe)
    assert parse_recipe(show(recipe), "shown.yaml") == recipe


@pytest.mark.parametrize("key", ["lr: 1e-4", "trainable: all", "lora: {rank: 4}", "steps: 3", "warmup_steps: 0"])
def test_a_conversion_step_refuses_what_only_training_reads_and_shows_none_of_it(key):
    step = "kind: convert_step\n    hybrid: none\n    "
    message = f"r.yaml:15 stages.1.{key.partition(':')[0]}: a convert_step stage has no such key; allowed: name, kind, "
    with pytest.raises(UserError, match=re.escape(message)):
        parse("kind: distil\n    tokens: 100000\n    lr: 1e-4", step + key)
    recipe = parse("kind: distil\n    tokens: 100000\n    lr: 1e-4", step + "tokens: 7")
    assert parse_recipe(show(recipe), "shown.yaml") == recipe
    shown = show(recipe).partition("kind: convert_step")[2].partition("training:")[0]
    assert "tokens: 7" in shown
    assert "lr" not in shown


def test_changes_are_those_a_resumed_run_may_not_make():
    recipe = parse()
    free = parse("", "", "logging.every_steps=5", "training.commit_every_steps=3", "evaluation.tokens=100")
    assert changes(recipe, free) == []
    other = parse("", "", "stages.1.lr=2e-4", "training.seed=3")
    assert changes(recipe, other) == ["stages.1.lr: 0.0001 -> 0.0002", "training.seed: 0 -> 3"]
    own = "evaluation.sources=[{path: a.txt}]"  # with which data.held_out is trained on
    assert changes(recipe, parse("", "", own)) == ["evaluation.sources: 'absent' -> 'there'"]
    assert changes(parse("", "", own), parse("", "", own.replace("a.txt", "b.txt"))) == []
    assert changes(parse("", "", "data.held_out=0"), parse("", "", own, "data.held_out=0")) == []
    longer = parse("", "", "stages=[{kind: align, steps: 10}]")
    assert any(line.startswith("stages.1.kind: 'distil' -> 'absent'") for line in changes(recipe, longer))


SECRETS = ["hf_AAAAdummy", "https://user:pw@host/data.jsonl", "sk-abcdefgh1234"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("place", ["model: {}", "model: demo\n  revision: '{}'", "model: demo\n  unknown: ['{}']"])
def test_a_secret_in_a_recipe_is_refused_and_never_printed(secret, place):
    for overrides, old, new in (((), "model: demo", place.format(secret)), ((f"teacher.model={secret}",), "", "")):
        with pytest.raises(UserError, match="token or a password") as caught:
            parse(old, new, *overrides)
        assert secret not in str(caught.value)
        assert "pw" not in str(caught.value).replace("password", "")


def test_keys_that_name_secrets_are_refused_without_their_value():
    for key in ("token", "hf_token", "api_key", "password", "wandb-api-key"):
        with pytest.raises(UserError, match=rf"^r.yaml:4 teacher.{key}: a recipe holds no secrets") as caught:
            parse("model: demo", f"model: demo\n  {key}: dummy-value")
        assert "dummy-value" not in str(caught.value)
    for key in ("cls_token", "tokens", "max_tokens", "eos_token_id", "pad_token", "key_path", "monkey"):
        assert not names_a_secret(key)


def test_masking_hides_secrets_and_the_environments_and_nothing_else(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-word-secret")
    masked = mask({"a": ["x hf_BBBBdummy y", "plain-word-secret"], "token": "abc", "cls_token": "[CLS]", "n": 3})
    assert masked == {"a": ["x *** y", "***"], "token": "***", "cls_token": "[CLS]", "n": 3}
    for path in ("runs/hf_models/llama3", "sk-learn-data/text.jsonl", "hf_dataset_v2.jsonl", "my_hf_AAAAdummy"):
        assert mask(path) == path
    assert mask("get https://user:pw@host/x?y=1") == "get https://***@host/x?y=1"
    assert mask("mail me@host.org, https://host/a@b") == "mail me@host.org, https://host/a@b"
    assert "plain-word-secret" not in show(parse("model: demo", "model: plain-word-secret"))


def test_files_are_found_here_or_among_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe("recipes/quickstart.yaml")
    assert load_recipe("quickstart.yaml") == load_recipe("quickstart") == shipped
    Path("quickstart").mkdir()
    assert load_recipe("quickstart") == shipped
    Path("quickstart.yaml").write_text(TEXT)
    assert load_recipe("quickstart.yaml") != shipped
    with pytest.raises(UserError, match=r"quikstart.yaml: no such file; .* \(did you mean 'quickstart.yaml'\?\)"):
        load_recipe("quikstart.yaml")
    with pytest.raises(UserError, match=r"quikstart: no such file; .* \(did you mean 'quickstart.yaml'\?\)"):
        load_recipe("quikstart")
    os.mkfifo("pipe.yaml")
    with pytest.raises(UserError, match=r"^pipe.yaml: is a pipe, not a file; shipped recipes: "):
        load_recipe("pipe.yaml")
    Path("latin.yaml").write_bytes(b"version: \xff")
    with pytest.raises(UserError, match=r"latin.yaml: cannot be read as UTF-8"):
        load_recipe("latin.yaml")
    Path("mark.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_recipe("mark.yaml").version == 1


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_opens_with_its_command(path):
    recipe = load_recipe(path)
    assert f"deltanet-distill recipes/{path.name}" in path.read_text()
    for source in recipe.data.sources:
        assert "{" not in "".join(source.path or ())


def test_the_shipped_json_schema_is_that_of_the_models():
    shipped = json.loads((recipes_folder() / "recipe.schema.json").read_text())
    assert shipped == json_schema(), "write it anew: python -m distill.recipe > recipes/recipe.schema.json"


def test_every_kind_that_runs_has_losses_and_defaults_that_load():
    assert set(KINDS) == set(DEFAULTS_OF) == set(LOSSES_OF)
    for kind, defaults in DEFAULTS_OF.items():
        stage = Stage(kind=kind, **({"steps": 1} | defaults))
        assert {loss.name for loss in stage.losses} <= set(LOSSES_OF[kind])
