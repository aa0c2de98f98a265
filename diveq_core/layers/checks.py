"""What a layer's settings must be, and how they say what they got instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import checked_count, checked_number
from diveq_core.arrays.rows import describe
from diveq_core.estimators.base import Single, check_estimator

if TYPE_CHECKING:
    from diveq_core.layers.settings import Settings

# What users see: the layer that they made.
_NAME = "VectorQuantizer"

UPDATES = ("gradient", "ema", "frozen", "linear")
STARTS = ("data", "kmeans", "normal")
FACTORS = ("weight", "embedding", "both")
SOURCES = ("vectors", "codewords")
NOT_FINITE = ("mark", "skip", "refuse")


def options(settings: Settings) -> None:
    """Refuse what no option may be; numbers become those of Python."""
    for field in ("dim", "heads", "stages"):
        _set(settings, field, checked_count(_NAME, field, getattr(settings, field)))
    _set(settings, "replace_every", checked_count(_NAME, "replace_every", settings.replace_every, at_least=0))
    _set(settings, "ema_decay", checked_number(_NAME, "ema_decay", settings.ema_decay, 0, 1))
    _set(settings, "replace_threshold", checked_number(_NAME, "replace_threshold", settings.replace_threshold, 0, 1))
    for field in ("codebook_weight", "commitment_weight"):
        if getattr(settings, field) is not None:
            _set(settings, field, checked_number(_NAME, field, getattr(settings, field), 0.0, float("inf")))
    for field in ("cosine", "shared", "quantizer_dropout"):
        if not isinstance(getattr(settings, field), bool):
            raise TypeError(f"{_NAME}: {field} must be True or False, got {describe(getattr(settings, field))}")
    for field, choices in (
        ("codebook_update", UPDATES),
        ("init", STARTS),
        ("linear_factors", FACTORS),
        ("not_finite", NOT_FINITE),
    ):
        if getattr(settings, field) not in choices:
            got = getattr(settings, field)
            raise ValueError(f"{_NAME}: {field} must be one of {', '.join(choices)}, got {got!r}")
    if settings.replace_by is not None and settings.replace_by not in SOURCES:
        raise ValueError(f"{_NAME}: replace_by must be one of {', '.join(SOURCES)}, got {settings.replace_by!r}")
    if isinstance(settings.channel_axis, bool) or not isinstance(settings.channel_axis, int):
        raise TypeError(f"{_NAME}: channel_axis must be an integer, got {describe(settings.channel_axis)}")
    check_estimator(_NAME, settings.estimator)
    if not isinstance(settings.estimator, Single):
        raise TypeError(
            f"{_NAME}: estimator must be one of a single part, got {describe(settings.estimator)}; give heads= and "
            f"stages= instead"
        )


def sizes(settings: Settings) -> None:
    """Refuse sizes that do not fit the estimator or each other; levels decide on a projection."""
    if settings.has_codebook:
        if settings.codebook_size is None:
            raise TypeError(f"{_NAME}: codebook_size must be an integer for {describe(settings.estimator)}, got None")
        _set(
            settings,
            "codebook_size",
            checked_count(_NAME, "codebook_size", settings.codebook_size, at_least=settings.corners),
        )
    elif settings.codebook_size is not None:
        raise TypeError(
            f"{_NAME}: codebook_size must be None for {describe(settings.estimator)}, which has no codebook, got "
            f"{settings.codebook_size!r}"
        )
    if settings.codebook_dim is not None:
        _set(settings, "codebook_dim", checked_count(_NAME, "codebook_dim", settings.codebook_dim))
    _levels(settings)
    if settings.width % settings.heads:
        raise ValueError(
            f"{_NAME}: heads must divide the {settings.width} entries that are quantized, got {settings.heads} heads"
        )


def _levels(settings: Settings) -> None:
    levels = getattr(settings.estimator, "levels", None)
    if levels is None:
        return
    wanted = len(levels) * settings.heads
    if settings.codebook_dim is None and wanted != settings.dim:
        _set(settings, "codebook_dim", wanted)
    if wanted != settings.width:
        raise ValueError(
            f"{_NAME}: {describe(settings.estimator)} must have a level for each of "
            f"{settings.width // settings.heads} entries, got {len(levels)} levels"
        )


def together(settings: Settings) -> None:
    """Refuse options that do not go together."""

    def refuse(condition: bool, text: str) -> None:
        if condition:
            raise ValueError(f"{_NAME}: {text}")

    trained = settings.codebook_update != "gradient"
    if not settings.has_codebook:
        refuse(trained, f"codebook_update must be gradient without a codebook, got {settings.codebook_update}")
        refuse(settings.cosine, "cosine must be False without a codebook, got True")
        refuse(any(settings.weights), "the weights of losses must be 0 without a codebook")
    if settings.on_curve:
        refuse(settings.codebook_update == "ema", "codebook_update cannot be ema on a curve, whose output is between")
        refuse(any(settings.weights), "the weights of losses must be 0 on a curve, whose output is between codewords")
        refuse(settings.stages * settings.heads > 1, "heads and stages must be 1 on a curve")
    if settings.takes_logits:
        refuse(settings.stages > 1, "stages must be 1 for GumbelST, whose output is not of the space of its logits")
        refuse(settings.codebook_update == "ema", "codebook_update cannot be ema for GumbelST, which takes logits")
        refuse(settings.cosine, "cosine must be False for GumbelST, which takes logits")
        refuse(any(settings.weights), "the weights of losses must be 0 for GumbelST, which takes logits")
    refuse(
        settings.replace_by == "vectors" and not settings.exchangeable,
        "replace_by must be codewords on a curve, for GumbelST and in a linear codebook",
    )
    refuse(settings.quantizer_dropout and settings.stages == 1, "quantizer_dropout needs more than one stage")
    refuse(settings.shared and settings.heads * settings.stages == 1, "shared needs more than one head or stage")
    refuse(settings.codebook_update == "linear" and settings.cosine, "cosine must be False for a linear codebook")


def _set(settings: Settings, field: str, value: Any) -> None:
    object.__setattr__(settings, field, value)
