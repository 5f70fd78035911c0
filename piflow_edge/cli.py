"""The `piflow-edge` command: parse, call, report. What a command does, a Python caller does with the same names.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 1 ran but the check failed, 2 wrong usage,
missing extra or unusable input, 130 stopped with Ctrl-C.
"""

import click

from .commands import build_engines as building
from .commands import bulk_images, bundles, device, evaluate, images, sending, serving, training
from .commands.options import add_progress_options
from .errors import MissingExtraError, PiFlowError

# Packages of the `train` extra, by the name they are imported under.
_TRAIN_PACKAGES = {"torch", "onnx", "onnxscript", "safetensors", "accelerate", "sklearn", "scipy"}

# What a command says of going on when it is stopped with Ctrl-C.
_GOING_ON = {
    "demo": "; the same command goes on where it was",
    "train-teacher": "; the same command with --resume goes on",
    "distill": "; the same command with --resume goes on",
    "generate": "; the same command goes on where it was",
}


class Group(click.Group):
    """The one place where errors become messages and exit codes."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except PiFlowError as error:
            click.echo(f"piflow-edge: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"piflow-edge: stopped{_GOING_ON.get(context.invoked_subcommand, '')}", err=True)
            context.exit(130)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; click knows what to do
        except OSError as error:  # a full disk, a path that cannot be written
            where = f": {error.filename}" if error.filename else ""
            click.echo(f"piflow-edge: {error.strerror or error}{where}", err=True)
            context.exit(2)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in _TRAIN_PACKAGES:
                raise
            missing = MissingExtraError(
                f"this command needs {error.name!r}; get it with: pip install 'piflow-edge[train]'"
            )
            click.echo(f"piflow-edge: {missing}", err=True)
            context.exit(missing.exit_code)


@click.group(cls=Group, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="piflow-edge")
def main():
    """Distil flow-matching image generators to 1-4 network calls, export them, run them without PyTorch."""


# Commands that may take long, which say how far they are.
_LONG = (
    evaluate.demo,
    training.train_teacher,
    training.distill,
    training.train_features,
    evaluate.evaluate,
    bundles.export,
    building.build,
    images.sample,
    bulk_images.generate,
    bundles.verify,
    device.bench,
)
_SHORT = (
    serving.serve,
    serving.web,
    bundles.inspect,
    sending.sign,
    sending.pack,
    sending.unpack,
    sending.triton,
    device.doctor,
)

for command in _LONG:
    add_progress_options(command)
for command in (*_LONG, *_SHORT):
    main.add_command(command)


if __name__ == "__main__":
    main()
