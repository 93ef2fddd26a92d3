"""A card says what the files beside it say, in YAML the Hub's own library reads, and nothing else."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from published import make_student

from convert import convert
from convert.publish.card import make_card
from deltanet_errors import UserError

CLOSENESS = {
    "tokens": 4096,
    "teacher_perplexity": 5.0,
    "student_perplexity": 6.25,
    "kl": 0.125,
    "no_mixer": {"perplexity": 13.0, "kl": 0.9},
    "layers": [],
    "ranking": [],
    "recall": {
        "distance": 128,
        "repeat": {"teacher": 0.5, "student": 0.25},
        "needle": {"teacher": 1.0, "student": 0.0},
    },
}
REPORT = {
    "results": [
        {"model": "teacher", "perplexity": 4.0},
        {"model": "converted", "perplexity": 8.0, "kl": 0.5},
        {"model": "after distil", "perplexity": 5.0, "kl": 0.0625},
    ],
    "tokens": 123456,
    "held_out_tokens": 789,
    "command": "deltanet-distill deltanet_recipe.yaml",
}
RECIPE = {
    "data": {"sources": [{"dataset": "owner/novels"}, {"path": ["/home/me/chat.json"]}]},
    "evaluation": {"sources": [{"path": ["/home/me/held.txt"]}]},
}
TASKS = {
    "recall": {"accuracy": 0.75, "stderr": 0.03, "n": 200, "teacher": {"accuracy": 0.875, "stderr": 0.02}},
    "alone": {"accuracy": 0.5, "stderr": 0.1, "n": 25},
}


def card_of(folder) -> ModelCard:
    return ModelCard(make_card(folder))


def test_metadata_and_layers_of_a_conversion(student):
    card = ModelCard((student / "README.md").read_text())
    data = card.data.to_dict()
    assert data["license"] == "llama3.2"
    assert data["language"] == "en"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["deltanet", "linear-attention", "hybrid"]
    assert "base_model" not in data  # a folder of this machine is no model of the Hub
    assert "model-index" not in data  # nothing was measured
    assert "1 of its 2 attention layers run on the delta rule" in card.text
    assert "dA   (d = delta rule x 1, A = attention x 1)" in card.text
    assert "Nothing was measured." in card.text
    assert "deltanet-convert source --hybrid layers:1 --max-shard-size 20KB --calibrate none -o OUT" in card.text
    assert 'begin the name of a model made from it with "Llama"' in card.text
    assert "Built with Llama" in card.text
    assert (student / "NOTICE").read_text().startswith("Llama 3.2 is licensed under the Llama 3.2 Community License")


def test_numbers_are_those_of_the_closeness_report(student):
    (student / "closeness.json").write_text(json.dumps(CLOSENESS))
    card = card_of(student)
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"perplexity": 6.25, "kl": 0.125}
    assert "| student | 6.25 | 1.25 | 0.1250 |" in card.text
    assert "| mixer removed | 13 | 2.6 | 0.9000 |" in card.text
    assert "repeat 0.500 and 0.250; needle 1.000 and 0.000" in card.text


def test_a_distillation_adds_its_results_its_recipe_and_its_data(student):
    (student / "closeness.json").write_text(json.dumps(CLOSENESS))
    (student / "report.json").write_text(json.dumps(REPORT))
    (student / "deltanet_recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (student / "evaluation.json").write_text(json.dumps({"tasks": TASKS}))
    card = card_of(student)
    assert card.data.datasets == ["owner/novels"]
    assert "distillation" in card.data.tags
    found = {(r.dataset_type, r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("held-out", "held-out text: held.txt", "perplexity"): 5.0,
        ("held-out", "held-out text: held.txt", "kl"): 0.0625,
        ("recall", "recall", "accuracy"): 0.75,
        ("alone", "alone", "accuracy"): 0.5,
    }
    assert "| after distil | 5 | 1.25 | 0.0625 |" in card.text
    assert "| recall | 200 | 0.875 ± 0.020 | 0.750 ± 0.030 |" in card.text
    assert "| alone | 25 | - | 0.500 ± 0.100 |" in card.text
    assert "saw 123,456 tokens" in card.text
    assert "no gradient step" not in card.text
    assert "converted and then distilled" in card.text
    assert "dataset: owner/novels" in card.text


def test_the_card_says_for_how_long_texts_a_student_was_trained(student):
    assert "sequences of up to" not in card_of(student).text
    told = {"data": {"seq_len": 1024}, "stages": [{"kind": "distil"}, {"kind": "long", "seq_len": 4096}]}
    (student / "deltanet_recipe.yaml").write_text(yaml.safe_dump(told))
    assert "trained on sequences of up to 4,096 tokens" in card_of(student).text
    (student / "deltanet_recipe.yaml").write_text(yaml.safe_dump(told | {"stages": [{"seq_len": 256}]}))
    assert "trained on sequences of up to 256 tokens" in card_of(student).text


def test_what_a_state_holds_and_how_it_is_read_is_told(source, tmp_path):
    options = {"local_window": 8, "feature_map": "linear", "state_positions": "fixed", "skip_conv": 2}
    convert(source, tmp_path / "student", hybrid="layers:1", calibrate=["none"], **options)
    text = card_of(tmp_path / "student").text
    assert "of the tokens before the last 8; to those and the first it attends. Learned maps turn queries" in text
    assert "as if all that it holds stood 8 tokens back" in text


def test_every_number_in_the_measured_section_stands_in_a_file(student):
    (student / "closeness.json").write_text(json.dumps(CLOSENESS))
    (student / "report.json").write_text(json.dumps(REPORT))
    section = card_of(student).text.split("## Measured")[1].split("## How to load")[0]
    known = {4096, 5, 6.25, 0.125, 13, 0.9, 128, 0.5, 0.25, 1, 0, 4, 8, 0.0625, 789}
    ratios = {1.25, 2.6, 2}
    numbers = {float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", section)}
    assert numbers <= known | ratios


def test_the_base_model_is_the_repository_and_the_licence_its_own(student):
    record = json.loads((student / "conversion.json").read_text())
    record |= {"base_model": "meta-llama/Llama-3.2-1B", "revision": "abc"}
    (student / "conversion.json").write_text(json.dumps(record))
    card = card_of(student)
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert card.data.base_model_relation == "finetune"
    assert "# Llama-3.2-1B-deltanet" in card.text
    assert "[meta-llama/Llama-3.2-1B](https://huggingface.co/meta-llama/Llama-3.2-1B) at `abc`" in card.text


def test_an_unknown_licence_is_not_invented(source, tmp_path):
    (source / "README.md").unlink()
    card = ModelCard((make_student(tmp_path / "s", source) / "README.md").read_text())
    assert "license" not in card.data.to_dict()
    assert "licence could not be read" in card.text


def test_text_of_the_source_cannot_break_out_of_the_metadata(source, tmp_path):
    (source / "README.md").write_text('---\nlicense: "x\\n---\\nevil: 1"\nlanguage: ["a\\nb: 1", 7, en]\n---\n')
    convert(source, tmp_path / "s", calibrate=["none"])
    data = ModelCard((tmp_path / "s" / "README.md").read_text()).data.to_dict()
    assert "evil" not in data
    assert data["pipeline_tag"] == "text-generation"


def test_a_damaged_report_is_named(student):
    (student / "closeness.json").write_text("{")
    with pytest.raises(UserError, match=r"closeness\.json: unreadable"):
        make_card(student)


def test_a_model_without_a_teacher_is_compared_with_none(student):
    (student / "conversion.json").unlink()
    rows = [{"model": "new", "perplexity": 100.0}, {"model": "after pretrain", "perplexity": 25.0}]
    (student / "report.json").write_text(json.dumps({"results": rows}))
    card = card_of(student)
    assert "A model trained from nothing" in card.text
    assert "| after pretrain | 25 | - | - |" in card.text
    assert "base_model" not in card.data.to_dict()
