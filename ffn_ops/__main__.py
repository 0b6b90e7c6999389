# SPDX-License-Identifier: Apache-2.0
"""python -m ffn_ops {doctor,demo}: the command line. doctor.py and demo.py do the work."""

import sys

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"python -m ffn_ops needs {error.name}, which this Python does not have (pip install typer)")

app = typer.Typer(help="The fused feed-forward operator.", no_args_is_help=True, add_completion=False)


@app.command()
def doctor() -> None:
    """Say what is installed and what runs here; the exit code is 0 when the CPU path is healthy."""
    from ffn_ops.doctor import examine

    facts, problems = examine()
    for name, fact in facts.items():
        typer.echo(f"{name:18}{fact}")
    for problem in problems:
        typer.secho(problem, fg="red")
    if problems:
        raise typer.Exit(1)
    typer.secho("The CPU path is healthy.", fg="green")


@app.command()
def demo() -> None:
    """Replace the feed-forward blocks of a pretrained encoder, in every mode, and measure the quality."""
    from ffn_ops.demo import main

    main()


app()
