"""The table of a recipe's keys is that of the schema, and leaves none out."""

from pathlib import Path

from distill.recipe import json_schema
from distill.recipe_reference import SECTIONS, reference

DOCS = Path(__file__).parents[2] / "docs"


def test_the_shipped_table_is_that_of_the_schema():
    shipped = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert shipped == reference(), "write it anew: python -m distill.recipe_reference > docs/recipe.md"


def test_no_section_and_no_key_is_left_out():
    definitions = json_schema()["$defs"]
    assert set(SECTIONS.values()) == set(definitions)
    text = reference()
    assert all(f"| `{key}` |" in text for name in definitions for key in definitions[name]["properties"])
