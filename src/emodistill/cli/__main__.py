"""`python -m emodistill.cli` is `emodistill`."""

from emodistill.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main(prog_name="emodistill")
