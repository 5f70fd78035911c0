"""Every error raised on purpose, under one root, so that one `except` clause catches them all."""


class PiFlowError(Exception):
    """Root of the tree. `exit_code` is what the command line exits with when it reaches the top."""

    exit_code = 2


class UsageError(PiFlowError, TypeError):
    """A call that cannot be meant: an argument of another library, or pickling what cannot be pickled."""


class ScheduleError(PiFlowError, ValueError):
    """Noise levels, substep counts or schedule settings that make no sense."""


class ShapeError(PiFlowError, ValueError):
    """An array whose shape, dtype or content does not fit what it is used for."""


class ConditioningError(PiFlowError, ValueError):
    """Something that cannot steer these images, such as a prompt where there are classes."""


class LabelError(ConditioningError):
    """A class id or name the model does not know."""


class DataError(PiFlowError, ValueError):
    """Training or evaluation images that cannot be used."""


class FeatureError(PiFlowError, ValueError):
    """A feature extractor that cannot be read, or that does not fit the images."""


class BundleError(PiFlowError, ValueError):
    """An exported folder that is incomplete, altered, or of another version."""


class SigningKeyError(PiFlowError, ValueError):
    """A key file that is not an Ed25519 key in PEM."""


class CheckpointError(PiFlowError, ValueError):
    """A training checkpoint that is incomplete, altered, or of another architecture."""


class EngineError(PiFlowError, RuntimeError):
    """A backend or kernel that was asked for and cannot run here."""


class EngineNotBuiltError(EngineError):
    """An engine that must be built first, which `piflow-edge build` does."""


class NotFiniteError(EngineError):
    """A network that made NaN or infinity, of which there is no image."""


class MissingExtraError(PiFlowError, ImportError):
    """A command or engine needs a package that is not installed."""


class RecipeError(PiFlowError, ValueError):
    """A picture that does not say how it was made, or that this bundle did not make."""


class Cancelled(PiFlowError, RuntimeError):
    """Images that were being made and were given up because the caller said so."""

    exit_code = 130


class CheckFailedError(PiFlowError, RuntimeError):
    """The work was done but did not pass its check: parity, verification, finite values."""

    exit_code = 1
