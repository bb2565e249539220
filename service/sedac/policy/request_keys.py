"""The names by which a request says, in `vllm_xargs` (SamplingParams.extra_args), how it wants to be computed.

A client may set the first group. The server checks these, and adds the second; what a client sent of that is dropped.
"""

from __future__ import annotations

TIER_KEY = "sedac_tier"
"""Tier of the request. The server stamps the policy's default where a request names none. What reaches a worker without it is exact."""
SCALE_KEY, LEVEL_KEY = "sedac_threshold_scale", "sedac_level"
"""Knobs of the request's own, where the policy allows overrides."""
REQUEST_KEY = "sedac_key"
"""Who the request is for. In a roll-out one policy, in force or candidate, serves all requests of a key. The server takes it out."""
SPECULATION_KEY = "sedac_speculation"
"""If false, none of the request's tokens is drafted. Its answer is the same."""

CERTIFICATE_KEY = "sedac_certificate"
"""Set by the server alone: digest of the knobs of the certificate that the request was promised to be computed under."""
ROLLOUT_KEY = "sedac_rollout"
"""Set by the server alone: number of the roll-out whose candidate serves the request. If absent, the policy in force does."""
AUDIT_KEY = "sedac_audit"
"""Set by the server alone: the answer will be scored again."""
