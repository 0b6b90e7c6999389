# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with what weights: what ffn_ops.moe.route computes, in float64."""

import numpy as np

from reference.rounding import Array


def route(
    logits: Array,
    top_k: int,
    router: str,
    *,
    renormalize: bool = False,
    correction_bias: Array | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    scaling: float = 1.0,
) -> tuple[Array, Array]:
    """Ids and weights [M, top_k] of logits [M, E]; of equal experts the lower one."""
    M, E = logits.shape
    ids, weights = np.zeros((M, top_k), np.int64), np.zeros((M, top_k))
    for t, row in enumerate(logits.astype(np.float64)):
        odds = np.exp(row - row.max())
        scores = 1 / (1 + np.exp(-row)) if router == "sigmoid" else odds / odds.sum()
        choice = scores if correction_bias is None else scores + correction_bias
        allowed = np.arange(E)
        if n_group > 1:
            members = allowed.reshape(n_group, -1)
            worth = np.sort(choice[members], axis=1)[:, -2:].sum(axis=1)
            allowed = np.sort(members[np.argsort(-worth, kind="stable")[:topk_group]].ravel())
        ids[t] = allowed[np.argsort(-choice[allowed], kind="stable")[:top_k]]
        weights[t] = scores[ids[t]]
        if router == "topk_softmax" or renormalize:
            weights[t] /= weights[t].sum()
    return ids, weights * scaling
