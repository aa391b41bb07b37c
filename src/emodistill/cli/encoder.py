"""The command `emodistill encoder`: list the known encoders, and fetch one before training."""

import json

import click

from emodistill.encoders import KNOWN_ENCODERS, list_encoders, resolve_encoder

__all__ = ["encoder"]


@click.group()
def encoder() -> None:
    """List the known encoders, or fetch one.

    Training fetches what it needs by itself; fetch beforehand for a machine that will be offline.
    """


@encoder.command("list")
def list_() -> None:
    """List the encoders with a short name, their shapes, and where they lie on this machine.

    \b
      emodistill encoder list

    Any folder with a BERT, DistilBERT, RoBERTa or MPNet checkpoint (config.json, model.safetensors, tokenizer files)
    and any hub name can be given in place of a short name.
    """
    listings = list_encoders()
    rows = [("name", "family", "layers", "width", "parameters", "download", "folder")]
    for listing in listings:
        known = listing.encoder
        rows.append(
            (
                known.name,
                known.family,
                str(known.n_layers),
                str(known.hidden_size),
                f"{known.n_parameters / 1e6:.1f} M",
                f"{known.download_bytes / 1e6:.0f} MB",
                str(listing.folder or "(not fetched)"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    summary = [
        {
            "name": listing.encoder.name,
            "hub_id": listing.encoder.hub_id,
            "folder": str(listing.folder) if listing.folder else None,
        }
        for listing in listings
    ]
    click.echo(json.dumps({"encoders": summary}))


@encoder.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def fetch(names: tuple[str, ...]) -> None:
    """Fetch encoders to this machine and print their folders.

    \b
      emodistill encoder fetch minilm-l6

    NAME is one of the list, or a hub name such as organization/model. A local folder is only checked. What is on
    this machine already is not fetched again. The cache is ~/.cache/emodistill/encoders, or EMODISTILL_CACHE.
    """
    folders = {name: str(resolve_encoder(name)) for name in names}
    for name, folder in folders.items():
        click.echo(f"{name}  {folder}")
    click.echo(json.dumps({"folders": folders}))


fetch.epilog = f"Short names: {', '.join(sorted(KNOWN_ENCODERS))}."
