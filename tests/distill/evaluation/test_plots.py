"""The plots."""

import re

from made_report import alone, made

from distill.evaluation.plots import layer_picture, plots
from distill.evaluation.sections import sections


def test_every_figure_that_a_section_asks_for_is_drawn():
    for report in (made(), alone()):
        wanted = {name for section in sections(report) for name in section.figures}
        assert set(plots(report)) == wanted
        assert wanted


def test_the_same_numbers_are_the_same_bytes():
    assert plots(made()) == plots(made())
    report = made()
    report["by_position"][0]["perplexity"]["student"] = 30.0
    assert plots(report)["perplexity by position"] != plots(made())["perplexity by position"]


def test_no_two_plots_of_a_page_share_an_id_and_no_reference_leaves_its_plot():
    drawings = plots(made())
    owners: dict[str, str] = {}
    for name, drawing in drawings.items():
        ids = set(re.findall(r'\bid="([^"]+)"', drawing))
        assert not ids & owners.keys()
        owners |= dict.fromkeys(ids, name)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing)) <= ids


def test_a_layer_is_a_box():
    drawing = layer_picture(["linear_attention", "full_attention", "linear_attention"])
    assert drawing.count("<rect") == 3
    assert drawing.count("delta rule") == 2
