"""The Markdown form."""

from made_report import alone, made

from distill.evaluation.markdown import markdown


def test_every_row_of_a_table_has_the_cells_of_its_head():
    report = made()
    report["diagnostics"]["a|b"] = {"x|y": {"c": 1}}
    lines = markdown(report).splitlines()
    tables = "\n".join(lines).split("\n\n")
    tables = [part.splitlines() for part in tables if part.startswith("|")]
    assert len(tables) >= 6
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_what_a_model_writes_cannot_leave_its_line():
    text = markdown(made())
    assert "- student: ``a `dog`↵ran``" in text


def test_a_section_that_is_but_a_plot_is_on_the_page_only():
    report = made()
    assert report["losses"]
    assert "## Training" not in markdown(report)
    assert "## Language" in markdown(report)


def test_layers_are_a_letter_each():
    """The letters of deltanet-convert."""
    assert "Layers: `dAs   (d = delta rule x 1, A = attention x 1, s = attention in a window x 1)`" in markdown(made())
    assert "Layers" not in markdown(alone() | {"layers": None})
