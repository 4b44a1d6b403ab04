"""Commands that dsjax recommends or gives as examples are commands that it takes."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.cli.main import VERBS, overview, parser_of
from dsjax.runs.commands import command, resume, uses
from tests.helpers import parsed

ROOT = Path(__file__).parents[3]
paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_the_help_are_commands(verb):
    text = parser_of(verb)[0].format_help()
    if verb == "data":
        text = parser_of(verb)[0]._subparsers._group_actions[0].choices["build"].format_help()
    for line in re.findall(r"^  (dsjax .*)$", text, re.MULTILINE):
        parsed(line)


def test_there_are_examples():
    found = {verb for verb in VERBS if re.search(r"^  dsjax", parser_of(verb)[0].format_help(), re.MULTILINE)}
    assert found == {"generate", "evaluate", "embed", "analyze", "convert"}


def test_what_to_start_with_is_there():
    (line,) = re.findall(r"^Start with: (.*)$", overview(), re.MULTILINE)
    assert (ROOT / parsed(line).config).is_file()


@given(paths)
def test_any_path_comes_through_a_shell(name):
    folder = Path(name)
    found = parsed(resume(folder, "--force"))
    assert (
        (Path(found.config), Path(found.run_dir)) == (folder / "config.yaml", folder) and found.resume and found.force
    )
    for writes, classifies in ((True, False), (False, True), (False, False)):
        for line in uses(folder, writes=writes, classifies=classifies):
            assert Path(parsed(line).source) == folder
    (line,) = uses(Path("base"), writes=True, classifies=False, adapter=folder)
    assert (parsed(line).source, Path(parsed(line).adapter)) == ("base", folder)
    asked = parsed(command("generate", folder, f"--prompt={name}", "--temperature", "0.8"))
    assert asked.prompt == [name] and asked.temperature == 0.8


def test_other_advice_in_messages_is_a_command():
    """Every `dsjax VERB --option` in a message or docstring names a verb and options that there are."""
    pattern = re.compile(r"dsjax (" + "|".join(VERBS) + r")((?: build)?)((?: --[a-z-]+| [A-Z]{3,}| \.\.\.)*)")
    seen = 0
    for path in sorted((ROOT / "dsjax").rglob("*.py")):
        for verb, build, rest in pattern.findall(path.read_text()):
            parser = parser_of(verb)[0]
            if build:
                parser = parser._subparsers._group_actions[0].choices["build"]
            for option in re.findall(r"--[a-z-]+", rest):
                assert option in parser._option_string_actions, (path, verb, option)
                seen += 1
    assert seen >= 5
