"""The page: one file, nothing outside it, nothing a model wrote that a browser would run."""

import re
from html.parser import HTMLParser

from made_report import alone, made

from distill.evaluation.page import page

VOID = {"meta", "br", "img", "hr", "link"}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    return tags


def test_tags_are_balanced_with_and_without_a_teacher():
    for report in (made(), alone(), alone() | {"layers": None}):
        assert parsed(page(report)).open == []


def test_nothing_is_fetched_and_nothing_runs():
    text = page(made())
    for tag, attributes in parsed(text).seen:
        assert tag not in ("script", "link", "iframe", "object", "img")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_names_and_texts_are_escaped():
    text = page(made())
    assert "<b>mine" not in text
    assert "&lt;b&gt;mine&lt;/b&gt;" in text
    assert "Once &lt;i&gt;" in text


def test_the_same_report_is_the_same_page():
    assert page(made()) == page(made())


def test_every_plot_and_the_layers_are_on_it():
    assert sum(tag == "svg" for tag, _ in parsed(page(made())).seen) == 1 + 8  # layers; 2 language, 1 task, 4, 1 loss
