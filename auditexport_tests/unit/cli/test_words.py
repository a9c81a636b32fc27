"""The CLI as a whole: every command can be used by a script and completed by a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from auditexport_pipeline.cli import main

# `dev` runs in the foreground for a person; a shell's script and Prometheus' text are for programs already.
WITHOUT_JSON = {"dev", "completion", "metrics"}


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield " ".join((*above, name)), command


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_says_its_exit_statuses(name: str) -> None:
    """The author of a script reads the help, and must not have to read the source."""
    shown = CliRunner().invoke(main, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert "exit status" in " ".join(shown.output.lower().split())
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert ("--json" in flags) is (name not in WITHOUT_JSON)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_for_each_shell(shell: str) -> None:
    """It is what a package installs; it has to name this program and its variable."""
    script = CliRunner().invoke(main, ["completion", shell]).output
    assert "_AUDITEXPORT_COMPLETE" in script
    assert f"{shell}_complete" in script
    refused = CliRunner().invoke(main, ["completion", "csh"])
    assert refused.exit_code == 2


def test_a_shell_completes_commands_and_options() -> None:
    """The script asks the program what can come next."""
    asked = {"_AUDITEXPORT_COMPLETE": "bash_complete", "COMP_WORDS": "auditexport batches ", "COMP_CWORD": "2"}
    answer = CliRunner().invoke(main, [], env=asked, prog_name="auditexport").output
    assert {line.partition(",")[2] for line in answer.split()} == {"list", "show"}
    asked |= {"COMP_WORDS": "auditexport drain --batch", "COMP_CWORD": "2"}
    answer = CliRunner().invoke(main, [], env=asked, prog_name="auditexport").output
    assert {line.partition(",")[2] for line in answer.split()} == {"--batch-rows", "--batch-bytes"}


def test_bash_takes_the_script() -> None:
    """A syntax error would show in every new shell."""
    script = CliRunner().invoke(main, ["completion", "bash"]).output
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
