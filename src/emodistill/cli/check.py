"""`emodistill check FILE...`: what a file holds and everything that is wrong with it."""

import json
import sys

import click

from emodistill.checking import check_file

__all__ = ["check"]


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--labels", help="Names of the label columns, with commas between. Default: all but 'text' and 'id'.")
@click.option("--texts-only", is_flag=True, help="Look at 'text' and 'id' only, as predict does.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON for each file.")
def check(files: tuple[str, ...], labels: str | None, texts_only: bool, as_json: bool) -> None:
    """Say what each FILE (.csv, .tsv, .jsonl, .parquet) holds and everything that is wrong with it.

    Exits with 2 if anything is wrong, so that a script can stop before hours of training.
    """
    label_names = None if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    all_ok = True
    for path in files:
        report = check_file(path, label_names=label_names, texts_only=texts_only)
        all_ok &= report.ok
        click.echo(json.dumps(report.to_json()) if as_json else report.to_text())
    if not all_ok:
        sys.exit(2)
