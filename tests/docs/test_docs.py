"""Pages that cannot lie: their code runs, their links lead somewhere, their commands exist.

Python blocks of a page run in order, in one namespace, in an empty folder. The models they name are
replaced by a tiny random one: what is put into ``MODEL``, what is given to ``load``, ``Engine`` or
``inspect``, and the reference models wherever they appear.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

import understudy
from docs import pages
from understudy import registry, turns
from understudy.cli import app
from understudy.experts import transfer
from understudy.experts.device import queue as device_queue
from understudy.experts.device.reach import LINE, Reach
from understudy.experts.device.swiglu import FEW
from understudy.plan import MINIMUM_SLOTS
from understudy.policies.predict import SelfSwitch

MODEL_LINE = re.compile(r"""^(\s*MODEL\s*=\s*)["'].*["']""", re.MULTILINE)
REFERENCE = re.compile(r"""["'](?:\.?\.?/)*models/(?:fine|coarse)["']""")
GIVEN = re.compile(r"""(\b(?:load|Engine|inspect)\(\s*)["'][^"'\n]+["']""")

every_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)


def with_readme() -> Path:
    if not pages.README.is_file():
        pytest.skip("README.md is not written yet")
    return pages.README


# ---------------------------------------------------------------------------------------- code


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is gone when its test ends."""
    for known in (registry.EVICTORS, registry.PREDICTORS, registry.RESOLVERS, registry.ROUTES):
        monkeypatch.setattr(known, "_objects", dict(known._objects))


@every_page
def test_python_blocks_run(
    page: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registries: None,
) -> None:
    found = pages.blocks(page, "python")
    if not found or page.name == "serving.md":
        pytest.skip("no python here, or it needs a server: see test_serving.py")
    model = repr(str(request.getfixturevalue("speaking_model")))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in found:
        text = MODEL_LINE.sub(lambda m: m[1] + model, block.text)
        text = GIVEN.sub(lambda m: m[1] + model, text)
        text = REFERENCE.sub(lambda m: model, text)
        lines_up = "\n" * (block.line - 1)  # so that a traceback names the line of the page
        exec(compile(lines_up + text, str(page), "exec"), names)


@every_page
def test_entry_points_are_looked_for(page: Path) -> None:
    groups = {registry.EVICTORS.group, registry.PREDICTORS.group}
    for block in pages.blocks(page, "toml"):
        points = tomllib.loads(block.text).get("project", {}).get("entry-points", {})
        assert set(points) <= groups, block


def test_public_names_exist() -> None:
    for name in understudy.__all__:
        assert getattr(understudy, name) is not None


# --------------------------------------------------------------------------------------- links


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in pages.anchors(target), f"{page.name} links to {link}"


# ------------------------------------------------------------------------------------ commands

Click = Any  # typer brings its own copy of click, or imports it


def command_line() -> Click:
    return typer.main.get_command(app)


def parse(arguments: Sequence[str]) -> None:
    """Raise what the command line would complain of. Nothing is run."""
    group = command_line()
    if not arguments or arguments[0].startswith("-"):
        assert set(arguments) <= {"-h", "--help", "--version"}
        return
    assert arguments[0] in group.commands, f"no such command: {arguments[0]}"
    name, command, rest = group.resolve_command(None, list(arguments))
    if not {"-h", "--help"} & set(arguments):
        command.make_context(name, rest)


@every_page
def test_commands_parse(page: Path) -> None:
    for place, (program, *arguments) in pages.commands(page):
        try:
            if program == "understudy":
                parse(arguments)
            elif program.startswith("python") and arguments and arguments[0].endswith(".py"):
                assert (pages.ROOT / arguments[0]).is_file(), "no such file"
            elif program == "make":
                targets = {a for a in arguments if "=" not in a and not a.startswith("-")}
                assert targets <= make_targets(), "no such target"
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else str(error)
            pytest.fail(f"{place}: {program} {' '.join(arguments)}: {said}")


def make_targets() -> set[str]:
    text = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE))


@every_page
def test_commands_and_options_named_in_the_text_exist(page: Path) -> None:
    group = command_line()
    options = {"--help", "--version"}
    for command in group.commands.values():
        options |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    for code in pages.inline_code(page):
        if (words := code.split())[:1] == ["understudy"] and len(words) > 1:
            assert words[1] in group.commands or words[1] in options, f"{page.name}: {code}"
        if code.startswith("--"):
            name = code.split()[0].split("=")[0]
            assert name in options | {"--kernel"}, f"{page.name}: {code}"


def test_the_readme_names_every_command() -> None:
    text = with_readme().read_text(encoding="utf-8")
    named = set(re.findall(r"(?:understudy +|`)([a-z]+(?: serve)?)\b", text))
    named |= {name.split()[0] for name in named}
    missing = set(command_line().commands) - named
    assert not missing, f"README.md does not name {', '.join(sorted(missing))}"


def test_a_wrong_option_would_be_noticed() -> None:
    parse(["run", "models/fine", "A prompt", "--memory", "50%"])
    with pytest.raises(Exception, match="--memroy"):
        parse(["run", "models/fine", "A prompt", "--memroy", "50%"])
    with pytest.raises(AssertionError, match="no such command"):
        parse(["rnu"])


def test_commands_are_found_in_shell_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ UNDERSTUDY_MEMORY=1GiB .venv/bin/understudy run m 'a | b' | head\nunderstudy"
        "\n```\n```sh\nmake demo && understudy \\\n  doctor # here\n```\n"
    )
    assert [words for _, words in pages.commands(page)] == [
        ["understudy", "run", "m", "a | b"],
        ["head"],
        ["make", "demo"],
        ["understudy", "doctor"],
    ]


# ------------------------------------------------------------------------------ what pages state


def test_every_policy_has_its_section_and_nothing_else_has() -> None:
    page = pages.ROOT / "docs" / "policies.md"
    sections = [h.strip("`") for h in pages.headings(page, 3)]
    kinds = (registry.EVICTORS, registry.PREDICTORS, registry.ROUTES, registry.RESOLVERS)
    known = [name for kind in kinds for name in kind.builtin_names if name != "as-routed"]
    assert sorted(sections) == sorted(known)


def test_constants_are_those_of_the_code() -> None:
    """Numbers that pages quote; whoever changes one is told which pages speak of it."""
    assert transfer.DEMAND_BLOCK == 2 << 20, "how-it-works, glossary"
    assert transfer.SPECULATION_BLOCK == 2 << 20, "how-it-works, glossary"
    assert MINIMUM_SLOTS == 2, "how-it-works"
    assert device_queue.GROUP == 64 << 20, "gpu"
    assert device_queue.SPECULATION == 32 << 20, "gpu"
    assert (Reach().programs, Reach().lines * LINE) == (48, 8 << 10), "gpu"
    assert (turns.BLOCK, turns.WARM_UP, turns.ENOUGH) == (16, 2, 42), "gpu"
    assert FEW == 8, "gpu"
    trial = (SelfSwitch.WARM_UP, SelfSwitch.BLOCK, SelfSwitch.BLOCKS, SelfSwitch.SETTLE)
    assert trial == (8, 6, 6, 2), "policies, decisions"
    assert (SelfSwitch.REST, SelfSwitch.REST_OFF) == (1024, 256), "policies, decisions"


def test_glossary_is_in_order() -> None:
    text = pages.prose(pages.ROOT / "docs" / "glossary.md")
    terms = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:]
    terms = [t for t in terms if set(t) - set("-")]
    keys = [re.sub(r"\W+", " ", t.split(",")[0].lower()).strip() for t in terms]
    assert keys == sorted(keys)


def test_pages_name_no_place_of_one_machine() -> None:
    for page in pages.PAGES:
        assert not re.search(r"(?<!\w)/(?:work|tmp|home|root)/\w", page.read_text("utf-8")), page


def test_that_nothing_ran_on_a_gpu_is_said_first_and_as_long_as_it_is_true() -> None:
    page = (pages.ROOT / "docs" / "gpu.md").read_text("utf-8")
    said = "Nothing on this page has run on an accelerator yet." in page.split("\n\n")[1]
    table = page.split("## Targets")[1].split("\n## ")[0]
    measured = re.findall(r"^\|.*\| ([^|]+) \|$", table, re.MULTILINE)[2:]
    assert said == (set(measured) == {"not run"})
