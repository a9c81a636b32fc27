"""The commands as a whole: a script can use each, and a shell completes them."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from auditexport_pipeline.cli import main

# They run until they are stopped, or print text for programs.
WITHOUT_JSON = {"dev", "completion", "metrics"}


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield " ".join((*above, name)), command


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_documents_its_exit_statuses(name: str) -> None:
    """The author of a script reads the help, and must not have to read the source."""
    shown = CliRunner().invoke(main, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert "exit status" in " ".join(shown.output.lower().split())
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert ("--json" in flags) is (name not in WITHOUT_JSON)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_for_each_shell(shell: str) -> None:
    """Packages install it; it has to name this program's variable."""
    script = CliRunner().invoke(main, ["completion", shell]).output
    assert "_AUDITEXPORT_COMPLETE" in script
    assert f"{shell}_complete" in script


@pytest.mark.parametrize(
    ("words", "completed"), [("batches ", {"list", "show"}), ("drain --batch", {"--batch-rows", "--batch-bytes"})]
)
def test_a_shell_completes_commands_and_options(words: str, completed: set[str]) -> None:
    """The script asks the program, which has to answer."""
    asked = {"_AUDITEXPORT_COMPLETE": "bash_complete", "COMP_WORDS": f"auditexport {words}", "COMP_CWORD": "2"}
    answer = CliRunner().invoke(main, [], env=asked, prog_name="auditexport").output
    assert {line.partition(",")[2] for line in answer.split()} == completed
