"""The command that makes many images: `generate`."""

import click

from .images import PROMPTS, SIZE, read_prompts, sampling_options, set_size
from .options import (
    BUNDLE,
    FOLDER,
    JSON,
    TRUSTED_KEYS,
    command,
    emit,
    engine_options,
    engine_settings,
    say,
    settings_options,
)


def _read_part(context, parameter, text: str) -> tuple[int, int]:
    first, _, number = text.partition("/")
    if not (first.isascii() and number.isascii() and first.isdigit() and number.isdigit()):
        raise click.BadParameter(f"give I/N, such as 0/4 for the first of four; got {text!r}")
    if not int(first) < int(number):
        raise click.BadParameter(f"of {number} parts the last is {int(number) - 1}; got {text!r}")
    return int(first), int(number)


@command()
@BUNDLE
@click.option("--labels", help="Class ids or names, separated by commas, ranges such as 0-9, or all.")
@PROMPTS
@settings_options("bulk", "piflow_edge.runtime.bulk.bulk_job:BulkSettings")
@click.option("--out", type=FOLDER, required=True, help="Folder of the shards.")
@sampling_options(without=("strength", "resamples"))
@SIZE
@click.option("--part", callback=_read_part, default="0/1", metavar="I/N",
              help="Make only part I of N, from 0 on: so several processes or machines share the work.")  # fmt: skip
@settings_options("cluster", "piflow_edge.runtime.bulk.ray_workers:ClusterSettings")
@engine_options
@click.option("--precision", help="One of the bundle's; else its first.")
@TRUSTED_KEYS
@JSON
def generate(
    bundle, labels, prompts, bulk, out, settings, size, part, cluster, engine, device, threads, cores, precision,
    trusted_keys, as_json,
):  # fmt: skip
    """Make many images, as shards that WebDataset reads.

    Each tar file in --out holds PNG pictures, each with its recipe as JSON beside it and, where something steers, its
    prompt or class as text. Image i is the same for any number of workers. Stopped or killed, the same command goes on
    where it was.

    \b
    Example:
      piflow-edge generate digits --labels all --count 1000 --out images
      piflow-edge generate bundles/mine --prompts prompts.txt --count 4 --out images --part 0/2
    """
    settings = set_size(settings, size)
    subjects = {"labels": labels, "prompts": read_prompts(prompts) or None}
    opening = {"trusted_keys": trusted_keys, **engine_settings(engine, device, threads, cores)}
    run = _generate_here if cluster.ray is None else _generate_on_ray
    job, made = run(bundle, out, precision, bulk, settings, subjects, opening, part, cluster)
    _report(job, made, out, as_json)


def _generate_here(bundle, out, precision, bulk, settings, subjects, opening, part, cluster):
    from piflow_edge.runtime.bulk.bulk_job import build_job, claim_folder
    from piflow_edge.runtime.bulk.bulk_work import make_shards
    from piflow_edge.runtime.loading import load

    with load(bundle, precision=precision, **opening) as generator:
        job = build_job(generator.bundle, generator.engine.name, precision, bulk, settings, **subjects)
        claim_folder(out, job)
        return job, make_shards(generator, job, out, part)


def _generate_on_ray(bundle, out, precision, bulk, settings, subjects, opening, part, cluster):
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.runtime.bulk.bulk_job import build_job, claim_folder
    from piflow_edge.runtime.bulk.ray_workers import make_shards_on_ray

    engine = opening.pop("engine")
    if engine == "auto" or part != (0, 1):
        raise click.UsageError(
            "with --ray give --engine a name, so that all workers draw alike, and leave --part out"
        )
    opened = Bundle(bundle, trusted_keys=opening["trusted_keys"])
    job = build_job(opened, engine, precision, bulk, settings, **subjects)
    claim_folder(out, job)
    return job, make_shards_on_ray(cluster, job, out, bundle, opening)


def _report(job, made: int, out, as_json: bool) -> None:
    from piflow_edge.runtime.bulk.bulk_work import sweep

    is_whole = sweep(job, out)
    if as_json:
        shards = {"made": made, "in_all": len(job.shards)}
        emit({"folder": str(out), "images": job.total, "shards": shards, "complete": is_whole})
        return
    say(
        f"{made} of {len(job.shards)} shards made" + ("" if is_whole else "; some of other parts are missing")
    )
    click.echo(out)
