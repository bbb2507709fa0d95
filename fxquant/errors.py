"""The errors (and a warning) that users see. Each says what was wrong, where, and what to do."""


class FxquantError(Exception):
    """Base of every error that fxquant raises on purpose."""


class SchemeError(FxquantError, ValueError):
    """A scheme's text or a combination of its parts is not valid."""


class SpellingError(SchemeError):
    """A scheme's text is not understood; the message points at the place."""


class NoEffectError(SchemeError):
    """A scheme, or a repair that it names, changes nothing in this model; the message says why."""


class ModelError(FxquantError, ValueError):
    """The model is not one that can be traced or quantized."""


class TracingError(ModelError, RuntimeError):
    """The model could not be traced, or the traced graph disagrees with the model."""


class CalibrationError(FxquantError, ValueError):
    """Calibration data are missing, empty, used up or unusable."""


class NonFiniteError(FxquantError, ValueError):
    """NaN or infinity where a finite number is needed; the message names the site."""


class VerificationError(FxquantError, RuntimeError):
    """The result of a pass breaks what the pass or its level promises."""


class DataError(FxquantError, ValueError):
    """Text, windows or an output folder cannot serve an evaluation."""


class WriteError(DataError):
    """A file or folder cannot be written: no room, read-only, or in the hands of another run."""


class CacheWarning(UserWarning):
    """What was kept of an earlier run is damaged: it is computed again."""


class InspectionError(FxquantError, ValueError):
    """A printout was asked for a pass, layer or site that the graph does not have."""


class BudgetError(FxquantError, RuntimeError):
    """No plan keeps the budget."""


class CheckpointError(FxquantError, ValueError):
    """A graph cannot be saved, or a saved one is damaged, foreign or from a newer version."""


class ExportError(FxquantError, ValueError):
    """A format cannot hold what a graph computes, or the engine computes something else from it."""


class DistributedError(FxquantError, RuntimeError):
    """The processes of a run do not find each other, or one of them has ended."""


class ArgumentError(FxquantError, TypeError):
    """A public function was called with arguments that it does not take."""


class GraphError(ModelError, TypeError):
    """What was given is no graph that fxquant made, or is one where a model is needed."""


class GraphAttributeError(FxquantError, AttributeError):
    """A graph was asked for what a Hugging Face model has and a graph has not."""


class GraphCallError(FxquantError, TypeError):
    """A graph was called with other inputs than input_ids and attention_mask."""


def notes_of(error: BaseException) -> str:
    """What was noted on an error's way up, each in brackets, to stand behind its text."""
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
