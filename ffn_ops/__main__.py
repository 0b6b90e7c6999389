# SPDX-License-Identifier: Apache-2.0
"""python -m ffn_ops {doctor,npu-check,explain,demo,bench}: the command line; modules so named do the work."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"python -m ffn_ops needs {error.name}, which this Python does not have (pip install typer)")

app = typer.Typer(help="The fused feed-forward operator.", no_args_is_help=True, add_completion=False)


@app.command()
def doctor(
    npu: Annotated[bool, typer.Option("--npu", help="Expect an NPU: its path must be healthy too.")] = False,
) -> None:
    """Say what is installed and what runs here; the exit code is 0 when the CPU path is healthy."""
    from ffn_ops.doctor import examine

    facts, problems = examine(npu)
    for name, fact in facts.items():
        typer.echo(f"{name:18}{fact}")
    for problem in problems:
        typer.secho(problem, fg="red")
    if problems:
        raise typer.Exit(1)
    typer.secho(f"The CPU path {'and the NPU path are' if npu else 'is'} healthy.", fg="green")


@app.command()
def npu_check(
    report: Annotated[Path, typer.Option(help="where to write what was found")] = Path("npu-report.json"),
) -> None:
    """On a machine with an NPU: show what only hardware can, and write a report to send back."""
    from ffn_ops.npu_check import main

    main(report)


@app.command()
def explain(
    activation: str,
    tensors: Annotated[list[str], typer.Argument(help="name=dtype[sizes], such as x=float16[32,1024]")],
    target: Annotated[str, typer.Option(help="cpu, ascend910b or ascend310p")] = "ascend910b",
    inner_precise: int | None = None,
    output_dtype: str | None = None,
) -> None:
    """Say what a target makes of a call, or every rule it breaks; the exit code is 0 when it takes it."""
    from ffn_ops import ContractError
    from ffn_ops import explain as plan

    operands: dict[str, Any] = {}
    for text in tensors:
        match = re.fullmatch(r"(\w+)=(\w+)\[([\d, ]*)\]", text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is not name=dtype[sizes], such as x=float16[32,1024]")
        operands[match[1]] = (match[2], tuple(int(size) for size in match[3].split(",") if size.strip()))
    try:
        explanation = plan(
            **operands,
            activation=activation,
            target=target,
            inner_precise=inner_precise,
            output_dtype=output_dtype,
        )
    except (ContractError, TypeError) as error:  # an unknown target; an operand that is missing or unknown
        raise typer.BadParameter(str(error)) from None
    typer.echo(explanation)
    if not explanation.ok:
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Replace the feed-forward blocks of a pretrained encoder, in every mode, and measure the quality."""
    from ffn_ops.demo import main

    main()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench(context: typer.Context) -> None:
    """Measure ours beside its competitors, in a checkout (bench --help)."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "__main__.py").exists():
        sys.exit("the benchmark is in the source tree, which this is not (run `make bench` in a checkout)")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], cwd=checkout))


app()
