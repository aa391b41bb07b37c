"""The command line: one verb per stage, imported when it is called.

`emodistill predict` must start fast and work without the training libraries, so a command's module is imported only
when that command runs (or when the help lists all), and a stage only inside the command that needs it.
"""

from importlib import import_module
from typing import Any

import click

import emodistill
from emodistill.errors import EmodistillError, MissingExtraError

__all__ = ["main"]

# Section of the help, command, and its home. The order is the order of a first day with the tool.
COMMANDS: dict[str, dict[str, str]] = {
    "The whole job": {
        "run": "emodistill.cli.commands:run",
    },
    "Its stages, one at a time, on the same run folder": {
        "train": "emodistill.cli.commands:train",
        "combine": "emodistill.cli.commands:combine",
        "distill": "emodistill.cli.commands:distill",
        "export": "emodistill.cli.commands:export",
        "bench": "emodistill.cli.commands:bench",
        "submit": "emodistill.cli.commands:submit",
    },
    "Looking at things and using them": {
        "check": "emodistill.cli.check:check",
        "inspect": "emodistill.cli.commands:inspect",
        "predict": "emodistill.cli.predict:predict",
        "publish": "emodistill.cli.commands:publish",
        "embed": "emodistill.cli.commands:embed",
        "encoder": "emodistill.cli.encoder:encoder",
    },
}

INTERRUPTED_EXIT_CODE = 130
EXTRA_OF = {
    **dict.fromkeys(
        (
            "matplotlib",
            "onnx",
            "safetensors",
            "scipy",
            "sklearn",
            "tensorflow",
            "tensorflow_model_optimization",
            "tf2onnx",
            "tf_keras",
            "threadpoolctl",
            "transformers",
        ),
        "train",
    ),
    "pyarrow": "parquet",
}


class LazyGroup(click.Group):
    """A group that imports a command's module on first use and turns our errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of the help."""
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        for section in COMMANDS.values():
            if cmd_name in section:
                module, _, attribute = section[cmd_name].partition(":")
                command: click.Command = getattr(import_module(module), attribute)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by what they are for."""
        for title, section in COMMANDS.items():
            rows = []
            for name in section:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name, command.get_short_help_str(limit=90)))
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what a user can mend ends as one sentence and an exit code, never as a traceback."""
        try:
            return super().invoke(ctx)
        except EmodistillError as error:
            click.echo(f"emodistill: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("emodistill: stopped", err=True)
            ctx.exit(INTERRUPTED_EXIT_CODE)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in EXTRA_OF:
                raise
            click.echo(f"emodistill: {MissingExtraError.for_extra(module, EXTRA_OF[module])}", err=True)
            ctx.exit(MissingExtraError.exit_code)
        except BrokenPipeError:
            raise  # `| head`: click ends quietly
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"emodistill: {place}{error.strerror or error}", err=True)
            ctx.exit(1)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="'emodistill COMMAND --help' explains a command with examples.",
)
@click.version_option(emodistill.__version__, prog_name="emodistill")
def main() -> None:
    """From a labelled CSV file to an int8 ONNX classifier that answers in about a millisecond.

    A file has a column 'text' and one 0/1 column per label. The whole job is one command:

    \b
      emodistill check train.csv
      emodistill run --train train.csv --dev dev.csv --test test.csv --out runs/first
      emodistill predict --model runs/first/bundles/tiny "Thanks, I owe you one"

    It trains several members on folds of the data, combines their out-of-fold predictions, teaches one small student
    to answer like all of them together, and exports it. A run that was stopped goes on when the same command is given
    again. Training needs  pip install 'emodistill[train]'; predicting does not.
    """
