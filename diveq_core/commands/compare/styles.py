"""Colour and line style of each recipe."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart; line styles repeat the distinction, and
# tell a recipe from the one of the same colour that is like it.
STYLES: dict[str, tuple[str, Any]] = {
    "unquantized": ("#000000", (0, (1, 1.2))),
    "vq-vae": ("#E69F00", "-"),
    "ste": ("#7F7F7F", "-"),
    "nsvq": ("#56B4E9", "-"),
    "diveq": ("#0072B2", "-"),
    "diveq-detach": ("#009E73", (0, (5, 2))),
    "radial-0.5": ("#CC79A7", (0, (4, 1.5, 1, 1.5))),
    "radial-2": ("#D55E00", (0, (4, 1.5, 1, 1.5))),
    "ema": ("#E69F00", (0, (1, 1.2))),
    "rotation": ("#E69F00", (0, (5, 2))),
    "linear": ("#0072B2", (0, (5, 2))),
    "sf-diveq": ("#882255", "-"),
    "sf-diveq-detach": ("#882255", (0, (5, 2))),
    "residual": ("#0072B2", (0, (1, 1.2))),
    "product": ("#0072B2", (0, (4, 1.5, 1, 1.5))),
    "fsq": ("#117733", "-"),
    "gumbel": ("#7F7F7F", (0, (5, 2))),
}
