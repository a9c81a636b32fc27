"""`auditexport completion`: the script that lets a shell complete commands and options.

What belongs here: the command. What does not: the completion itself, which click has.
"""

from __future__ import annotations

import click

from auditexport_pipeline.cli.group import main

SHELLS = ("bash", "zsh", "fish")


@main.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in this shell.

    \b
      bash   auditexport completion bash > ~/.local/share/bash-completion/completions/auditexport
      zsh    auditexport completion zsh > "${fpath[1]}/_auditexport"
      fish   auditexport completion fish > ~/.config/fish/completions/auditexport.fish

    Or for this shell only: eval "$(auditexport completion bash)". Exit status: 0, or 2 when the shell is none of these.
    """  # noqa: D301 - a raw \b is two characters to click, and it wraps the three lines
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    # Of the class itself: bash's own method would start a bash to ask for its version.
    script = found(main, {}, "auditexport", "_AUDITEXPORT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
