"""Which licence a source has, from a preset, its card or its LICENSE file; unknown stays unknown."""

import pytest

from convert.presets import PRESETS
from convert.publish.licences import by_title, card_head, from_head, licence_of


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_has_a_licence_the_hub_knows_with_obligations(preset, tmp_path):
    licence = licence_of(tmp_path, preset.repository, preset.licence)
    assert licence.obligations
    assert licence.identifier in ("apache-2.0", "llama3.1", "llama3.2", "other")
    assert (licence.identifier == "other") == (licence.link is not None) == (licence.name is not None)
    assert licence_of(tmp_path, preset.repository, None) == licence
    assert from_head(licence.metadata()) == licence


def test_llama_licences_name_the_notice_and_the_prefix():
    licence = by_title("Llama 3.2 Community License")
    assert licence.metadata() == {"license": "llama3.2"}
    assert licence.prefix == "Llama"
    assert licence.notice.endswith("Copyright © Meta Platforms, Inc. All Rights Reserved.")
    assert by_title("Meta Llama 3 Community License").prefix == "Llama 3"
    assert by_title("llama2").notice.startswith("Llama 2 is licensed under the LLAMA 2 Community License, Copyright")
    assert by_title("llama2").prefix is None


@pytest.mark.parametrize(
    ("head", "metadata"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: https://x.example/y",
            {"license": "other", "license_name": "mine", "license_link": "https://x.example/y"},
        ),
        ("license: llama3.3", {"license": "llama3.3"}),
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: OpenRAIL++", {"license": "openrail++"}),
        (
            "license: My Own License 2.0",
            {"license": "other", "license_name": "my-own-license-2.0"},
        ),
        ("license: llama2", {"license": "llama2"}),
    ],
)
def test_the_head_of_the_sources_card_tells(head, metadata, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Page\n")
    assert licence_of(tmp_path, "someone/model", None).metadata() == metadata


@pytest.mark.parametrize(
    ("start", "identifier"),
    [
        (
            "\n              Apache License\n          Version 2.0, January 2004",
            "apache-2.0",
        ),
        ("MIT License\n\nCopyright (c)", "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date", "llama2"),
    ],
)
def test_a_licence_file_tells_where_no_card_does(start, identifier, tmp_path):
    (tmp_path / "LICENSE").write_text(start)
    assert licence_of(tmp_path, "x", None).identifier == identifier


@pytest.mark.parametrize("text", ["", "# no head", "---\n[\n---\n", "---\n- list\n---\n", "---\nlicense: [1]\n---\n"])
def test_what_cannot_be_read_is_no_licence(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path, "x", None) is None


def test_a_huge_card_is_not_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * (1 << 20))
    assert card_head(tmp_path) == {}


def test_a_folder_of_licences_is_no_licence(tmp_path):
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "LICENSE-MIT").write_text("MIT License\n")
    assert licence_of(tmp_path, "nobody/model", None).identifier == "mit"
