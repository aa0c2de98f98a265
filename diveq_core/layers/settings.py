"""What a layer is, as a value: its sizes and options, and what follows from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diveq_core.estimators.base import Single
from diveq_core.estimators.distance import DiVeQ
from diveq_core.estimators.product import Product
from diveq_core.estimators.residual import Residual
from diveq_core.estimators.straight_through import STE
from diveq_core.layers import checks

if TYPE_CHECKING:
    from diveq_core.estimators.base import Quantizer, Shape

DEFAULT = DiVeQ()
"""The estimator of a layer that is given none."""


@dataclass(frozen=True)
class Settings:
    r"""All options of a layer; frozen and hashable, so that it may be a static argument of a compiled function.

    .. math:: z_q = \operatorname{out}\big(\text{quantizer}(\operatorname{in}(z), E)\big), \qquad
              \text{loss} = \beta\,L_{\text{codebook}} + \gamma\,L_{\text{commitment}}

    Parameters
    ----------
    dim : int
        Entries of a vector, D.
    codebook_size : int or None
        Codewords K; None for `FSQ`, which has none.
    estimator : Estimator
        What gives the gradient in training. Evaluation gives the codeword itself, or the nearest point of the curve.
    codebook_update : {"gradient", "ema", "frozen", "linear"}
        Whether the codebook is trained by the model's gradient, follows its vectors by moving averages
        (`ema_update`), keeps its first value, or is a product E W (`linear_codebook`).
    ema_decay : float
        The decay of the moving averages, in [0, 1).
    codebook_weight, commitment_weight : float, optional
        The weights :math:`\beta` and :math:`\gamma` of `codebook_loss` and `commitment_loss`. By default 0, but where
        the estimator gives the codebook no gradient: 0.25 for the commitment loss, and, if the codebook is trained by
        gradients, 1 for the codebook loss (van den Oord et al., arXiv:1711.00937, equation 3 and section 3.2).
    init : {"data", "kmeans", "normal"}
        The first codebook: vectors of the first batch in training, what `kmeans` makes of those in ten iterations, or
        normal numbers of standard deviation :math:`1/\sqrt D`, which all begin with until the first batch.
    replace_every : int
        After so many training steps `replace_unused` looks for codewords to replace; 0 for never. It waits until the
        codewords were chosen ten times each on average, before which one may be unused by chance.
    replace_threshold : float
        Share of the mean use up to which a codeword is unused, in [0, 1).
    replace_by : {"vectors", "codewords"}, optional
        What replaces them: vectors of the last step, or used codewords. By default vectors where these may stand for
        codewords, which they may not on a curve, for `GumbelST` and in a linear codebook.
    codebook_dim : int, optional
        Entries of a codeword, where it is to have others than D: vectors pass a trained affine map to them and
        another one back. For `FSQ` it is the number of levels, if that is not D.
    cosine : bool
        Search by direction: vectors and codewords are normalized first, and z_q consists of unit vectors.
    heads : int
        Groups of entries with a token each (`Product`).
    stages : int
        Stages, each of which quantizes what those before it left (`Residual`).
    shared : bool
        One codebook for all heads, or for all stages where there is one head.
    quantizer_dropout : bool
        In training each example, an entry of the first axis, uses a random number of the first stages only.
        The tokens of the dropped ones are -1.
    linear_factors : {"weight", "embedding", "both"}
        Which factor of a linear codebook is trained: W (D, D), E (K, D), or both.
    channel_axis : int
        The axis along which the vectors lie: -1 for (..., D), 1 for images (B, D, H, W).
    not_finite : {"mark", "skip", "refuse"}
        What becomes of a vector that is not finite: NaN and token -1; zeros, token -1 and no gradient, so that the
        loss stays finite; or a ValueError, which reads values and so waits for a device.

    Raises
    ------
    TypeError, ValueError
        If an option is of another type or out of range, or two do not go together.

    Examples
    --------
    >>> import diveq_core as dq
    >>> settings = dq.layers.Settings(dim=8, codebook_size=32, estimator=dq.STE(), codebook_update="ema")
    >>> settings.weights
    (0.0, 0.25)
    >>> settings.parameters, settings.buffers
    ((), ('averages', 'codewords', 'counts', 'started', 'steps', 'usage'))
    """

    dim: int
    codebook_size: int | None = None
    estimator: Quantizer = DEFAULT
    codebook_update: str = "gradient"
    ema_decay: float = 0.99
    codebook_weight: float | None = None
    commitment_weight: float | None = None
    init: str = "data"
    replace_every: int = 100
    replace_threshold: float = 0.0
    replace_by: str | None = None
    codebook_dim: int | None = None
    cosine: bool = False
    heads: int = 1
    stages: int = 1
    shared: bool = False
    quantizer_dropout: bool = False
    linear_factors: str = "weight"
    channel_axis: int = -1
    not_finite: str = "mark"

    def __post_init__(self) -> None:
        checks.options(self)
        checks.sizes(self)
        checks.together(self)
        # Now, since a compiler that traces a step can read what an instance holds and not add to it.
        for derived in (
            "weights",
            "quantizer",
            "hard",
            "parts",
            "codebooks",
            "shapes",
            "token_shapes",
            "parameters",
            "buffers",
        ):
            getattr(self, derived)

    @property
    def has_codebook(self) -> bool:
        return self.estimator.codebook_axes > 0

    @property
    def corners(self) -> int:
        return self.estimator.corners if isinstance(self.estimator, Single) else 1

    @property
    def on_curve(self) -> bool:
        """Whether codewords are corners of a curve, and a token is a segment and a position."""
        return self.corners > 1

    @property
    def takes_logits(self) -> bool:
        """Whether the estimator takes logits in the place of vectors, which an affine map then makes of these."""
        return not self.estimator.keeps_space

    @property
    def searches(self) -> bool:
        """Whether a token is the nearest codeword, in each head and stage."""
        return self.has_codebook and not (self.on_curve or self.takes_logits)

    @property
    def width(self) -> int:
        """Entries of what is quantized, of all heads together."""
        return self.dim if self.codebook_dim is None else self.codebook_dim

    @property
    def projected(self) -> bool:
        """Whether affine maps stand before and after."""
        return self.codebook_dim is not None

    @cached_property
    def quantizer(self) -> Quantizer:
        """What quantizes in training: the estimator in its heads and stages."""
        return self._assembled(self.estimator)

    @cached_property
    def hard(self) -> Quantizer:
        """What quantizes in evaluation, where codewords are chosen by distance."""
        return self._assembled(STE()) if self.has_codebook else self.quantizer

    def _assembled(self, estimator: Quantizer) -> Quantizer:
        inner = Residual(estimator, self.stages) if self.stages > 1 else estimator
        return Product(inner, self.heads) if self.heads > 1 else inner

    @cached_property
    def weights(self) -> tuple[float, float]:
        """The weights of codebook loss and commitment loss."""
        alone = self.has_codebook and not self.takes_logits and not getattr(self.estimator, "trains_codebook", True)
        by_gradient = self.codebook_update in ("gradient", "linear")
        codebook = self.codebook_weight if self.codebook_weight is not None else float(alone and by_gradient)
        if self.commitment_weight is not None:
            return codebook, self.commitment_weight
        return codebook, 0.25 if alone else 0.0

    @property
    def axes(self) -> Shape:
        """The axes of tokens for heads and stages, as far as there are several."""
        return tuple(count for count in (self.heads, self.stages) if count > 1)

    @property
    def codebook_axes(self) -> Shape:
        """The same axes of the codebook, which may be shared along the first."""
        return self.axes[1 if self.shared else 0 :]

    @cached_property
    def parts(self) -> list[Shape]:
        """Of each part the head and the stage, as far as there are several."""
        return list(itertools.product(*map(range, self.axes)))

    def own(self, part: Shape) -> Shape:
        """Where the codebook of a part is: its place along the first axes of the codebook."""
        return part[1:] if self.shared else part

    @cached_property
    def codebooks(self) -> list[Shape]:
        """The places of all codebooks."""
        return list(dict.fromkeys(self.own(part) for part in self.parts))

    @cached_property
    def codebook_shape(self) -> Shape:
        """(K, D), with axes for heads and stages before."""
        assert self.codebook_size is not None
        return (*self.codebook_axes, self.codebook_size, self.width // self.heads)

    @property
    def token_count(self) -> int:
        """How many tokens a codebook has: its codewords, the segments of a curve, the codes of `FSQ`."""
        return self.estimator.index_count(self.codebook_shape[-2:] if self.has_codebook else None)

    @property
    def table(self) -> str:
        """The array of the state whose rows are codewords."""
        return "embedding" if self.codebook_update == "linear" else "codewords"

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each array of the state."""
        shapes: dict[str, Shape] = {}
        if self.takes_logits:
            logits = self.heads * (self.codebook_size or 0)
            shapes |= {"in_weight": (self.dim, logits), "in_bias": (logits,)}
        elif self.projected:
            shapes |= {"in_weight": (self.dim, self.width), "in_bias": (self.width,)}
        if self.projected:
            shapes |= {"out_weight": (self.width, self.dim), "out_bias": (self.dim,)}
        if not self.has_codebook:
            return dict(sorted(shapes.items()))
        book = self.codebook_shape
        if self.codebook_update == "linear":
            shapes |= {"embedding": book, "weight": (*book[:-2], book[-1], book[-1])}
        else:
            shapes["codewords"] = book
        if self.codebook_update == "ema":
            shapes |= {"averages": book, "counts": book[:-1]}
        if self.from_data:
            shapes["started"] = ()
        shapes |= {"steps": (), "usage": book[:-1]}
        return dict(sorted(shapes.items()))

    @cached_property
    def token_shapes(self) -> dict[str, Shape]:
        """Those of the arrays that tokens depend on."""
        upkeep = ("averages", "counts", "usage", "steps", "started")
        return {name: shape for name, shape in self.shapes.items() if name not in upkeep}

    @property
    def from_data(self) -> bool:
        """Whether the first batch in training makes the first codebook."""
        return self.has_codebook and not self.takes_logits and self.init != "normal"

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The arrays of the state that gradients train."""
        names = {"in_weight", "in_bias", "out_weight", "out_bias"}
        if self.codebook_update == "gradient":
            names |= {"codewords"}
        if self.codebook_update == "linear":
            names |= {"weight", "embedding"} if self.linear_factors == "both" else {self.linear_factors}
        return tuple(name for name in self.shapes if name in names)

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """The others."""
        return tuple(name for name in self.shapes if name not in self.parameters)

    @property
    def replaces(self) -> bool:
        """Whether unused codewords are replaced."""
        return self.has_codebook and self.replace_every > 0 and self.codebook_update != "frozen"

    @property
    def exchangeable(self) -> bool:
        """Whether a vector may stand for a codeword."""
        return not (self.on_curve or self.takes_logits or self.codebook_update == "linear")

    @property
    def samples(self) -> bool:
        """Whether a step samples vectors that might replace codewords."""
        return self.replaces and self.exchangeable and self.replace_by != "codewords"

    def given(self) -> dict[str, Any]:
        """The options that are not the defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in ("dim", "codebook_size") or getattr(self, field.name) != field.default
        }

    def text(self) -> str:
        """These options, as a layer's representation shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.given().items())
