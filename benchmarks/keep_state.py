"""Keep a training run that is not at its end, small enough for a repository: weights and average in half precision.

Adam's moments are left out. A run that goes on from here finds its pace again within some hundred steps.

Run: python -m benchmarks.keep_state runs/emoji/teacher benchmarks/state/emoji-teacher
"""

from dataclasses import replace
from pathlib import Path

import click

from piflow_edge.distill.loop.checkpoint import load_checkpoint, save_checkpoint


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(run: Path, out: Path) -> None:
    """Write the checkpoint in RUN to OUT, in about an eighth of its size."""
    checkpoint = load_checkpoint(run)
    groups = ("raw", "ema")
    kept = {
        name: tensor.half() for name, tensor in checkpoint.tensors.items() if name.split(".")[0] in groups
    }
    save_checkpoint(out, replace(checkpoint, tensors=kept))
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: iteration {checkpoint.iteration}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
