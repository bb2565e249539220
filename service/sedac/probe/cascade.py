"""The decision rule of one checkpoint, pure: which tokens exit here.

T tokens that are allowed to exit and have not exited yet.
"""

from __future__ import annotations

from torch import Tensor

from sedac.policy import Scope


def choose_exits(risk_T: Tensor, threshold: float, scope: Scope) -> Tensor:
    """Return bool (T,): True where the token exits at this checkpoint.

    Scope `token`: risk below the threshold. Scope `batch`: all exit if the largest risk is below it, else none. NaN never
    exits, and a threshold of 0 exits nothing, since risk >= 0.
    """
    confident_T = risk_T < threshold
    if scope == "batch":
        return confident_T.all().expand_as(confident_T)
    return confident_T
