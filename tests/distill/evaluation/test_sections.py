"""What of a report is told, and how."""

from made_report import alone, made

from distill.evaluation.sections import sections, title


def by_title(report):
    return {section.title: section for section in sections(report)}


def test_every_part_has_its_section_and_every_table_its_columns():
    found = by_title(made())
    assert list(found) == [
        "In short", "Language", "Tasks", "Speed", "Memory", "Diagnostics", "Training", "What they write",
        "How it was measured",
    ]  # fmt: skip
    for section in found.values():
        for table in section.tables:
            assert all(len(row) == len(table.columns) for row in table.rows)
            assert all(isinstance(cell, str) for row in table.rows for cell in row)


def test_the_ratio_is_the_student_over_the_teacher():
    rows = {row[0]: row[1:] for row in by_title(made())["In short"].tables[0].rows}
    assert rows["perplexity"] == ["10", "12.5", "1.250"]
    assert rows["recall of a repeated passage, 24 tokens back"] == ["50.0%", "25.0%", "0.500"]
    assert rows["recall of random tokens, 24 tokens back"] == ["0.0%", "0.0%", ""]
    assert rows["needle"] == ["90.0%", "75.0%", "0.833"]
    # The teacher did not fit at the longest context, so there is nothing to compare.
    assert rows["decoding, tokens/s, 4,096 tokens"] == ["", "39.0", ""]


def test_language_is_told_by_position_by_what_stood_before_and_by_distance():
    by_position, by_seen, by_distance = by_title(made())["Language"].tables
    assert [row[0] for row in by_position.rows] == ["1–16", "17–63", "all"]
    assert by_seen.rows[1] == ["followed the same token before, 25%", "2", "4", "2.000", "0.3000", "60.0%"]
    assert by_distance.rows == [["64", "90.0%", "50.0%"], ["128", "80.0%", "25.0%"]]


def test_recall_without_a_part_is_told_in_percent_and_what_it_means():
    section = by_title(made())["Diagnostics"]
    assert section.tables[0].rows == [["layer 0", "0.5", "16"], ["layer 2", "0.25", ""]]
    assert section.tables[1].rows == [["all states", "0.25", "75.0%", "30.0%"]]
    (line,) = section.prose
    assert line.startswith("Recall N: ")
    without = made(diagnostics={"What is off": {"all states": {"loss rise": 0.25}}})
    assert not by_title(without)["Diagnostics"].prose


def test_the_best_trivial_strategy_is_held_against_both():
    (row,) = by_title(made())["Tasks"].tables[0].rows
    assert row == ["needle", "90.0% ± 3.0", "75.0% ± 5.0", "20.0% the first", "both", "80"]
    report = made()
    report["tasks"]["needle"]["accuracy"] = 0.29  # less than two standard errors above 0.2
    found = by_title(report)
    assert found["Tasks"].tables[0].rows[0][4] == "teacher"
    report["tasks"]["needle"]["teacher"]["accuracy"] = 0.25
    assert by_title(report)["Tasks"].tables[0].rows[0][4] == "none"


def test_a_ratio_to_a_teacher_that_only_guesses_is_not_told():
    report = made()
    report["tasks"]["needle"]["teacher"]["accuracy"] = 0.25
    rows = {row[0]: row[1:] for row in by_title(report)["In short"].tables[0].rows}
    assert rows["needle"] == ["25.0%", "75.0%", ""]


def test_further_figures_and_reasons_are_told():
    prose = by_title(made())["Tasks"].prose
    assert "needle: says A: student 25.0%." in prose
    assert "needle, floors without any model: reading 1 deep 60.0%, reading 2 deep 70.0%." in prose
    assert "Not run: task copying: too long." in prose


def test_a_task_folds_its_levels_and_what_each_model_said():
    (part,) = by_title(made())["Tasks"].folded
    assert part.tables[0].rows == [["64", "100.0% ± 0.0", "100.0% ± 0.0"], ["128", "50.0% ± 8.0", "50.0% ± 8.0"]]
    assert part.samples == [{"prompt": "a <u> b", "answer": "c", "said, teacher": "c", "said, student": "d"}]


def test_why_tasks_were_skipped_is_told_where_none_could_be_run():
    section = by_title(made(tasks={}))["Tasks"]
    assert section.tables == []
    assert section.prose[-1] == "Not run: task copying: too long."


def test_what_did_not_fit_is_said_in_its_cell():
    rows = by_title(made())["Speed"].tables[0].rows
    assert rows[1] == ["4,096", "does not fit in memory", "1,000", "does not fit in memory", "50.0 ms",
                       "does not fit in memory", "39.0"]  # fmt: skip


def test_a_student_alone_has_one_column():
    found = by_title(alone())
    assert found["In short"].tables[0].columns == ["", "value"]
    assert found["In short"].tables[0].rows == [["perplexity", "12.5"]]
    assert found["Language"].tables[0].columns == ["tokens before", "perplexity, student"]
    assert title(alone()) == "runs/<b>mine</b>"
