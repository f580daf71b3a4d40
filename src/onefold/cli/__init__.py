"""The command line, `onefold VERB ...`: argument parsing and printing, nothing else; a verb is a command."""

from onefold.cli.main import main as main
