"""The tokens and the seconds that a step may take, divided among the tenants.

A step that several tenants share takes at most ``_SLOWDOWN`` times what the fair share of each
tenant allows. Take a tenant with a quarter of the weight, whose rows alone would take a step of
30 ms: its fair share is a step every 120 ms. What a tenant does not need goes to the others, by
weight. Rows beyond a tenant's share sit out the step.

A tenant's first row and the first ``_MIN_CHUNK`` tokens of its first prompt may exceed its share,
so that they can be computed at all. The excess is a debt: the tenant sits out the next steps until
its shares have paid the debt. Debts are relative: at any time some tenant with work has none.

A step that decodes rows takes only so many tokens of prompts that the rows get their next tokens
within ``max_gap_s``, or within ``_MAX_TIMES`` the seconds of their step, however many tenants the
server has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from loraplex_server.engine.requests.request import Request, RequestStatus

from .step_cost import StepCost
from .tenant_queue import TenantQueue

_MAX_SHARED_S = 0.25  # of a step with several tenants
_MAX_LONE_S = 1.0  # of a step with one tenant, since others may come
_SLOWDOWN = 1.3  # of a tenant, relative to its fair share; 2 less room for errors of the estimate
_MAX_TIMES = 3.0  # prompts slow the rows of a step down by this factor at most
_MIN_CHUNK = 4  # tokens of a prompt
_ROUNDING = 1e-9


@dataclass(slots=True)
class _Share:
    """A tenant's part of a step, in seconds."""

    n_tokens: int  # left of the step's tokens, if the tenant were alone
    rows_s: float = 0.0  # of its decoding rows
    prompts_s: float = 0.0
    wants_more: bool = False  # requests wait
    left_s: float = 0.0  # not taken yet; negative: a debt
    may_exceed: bool = False  # the first row and prompt may take more
    kept_s: float = 0.0  # of these, for prompts
    is_used_up: bool = False  # a request got fewer tokens than it could have
    begun: set[bool] = field(default_factory=set)  # True: a row; False: a prompt

    @property
    def wanted_s(self) -> float:
        return math.inf if self.wants_more else self.rows_s + self.prompts_s


class StepBudget:
    """The rest of a step that is being composed."""

    def __init__(
        self,
        n_tokens: int,
        cost: StepCost,
        *,
        whole_prompts: bool = False,
        max_gap_s: float = math.inf,
    ) -> None:
        """``whole_prompts``: no prompt is divided; one that is longer gets a step of its own."""
        self.n_left = n_tokens
        self._whole_prompts, self._is_empty = whole_prompts, True
        self._n_tokens = n_tokens
        self._cost = cost
        self._shares: dict[TenantQueue, _Share] = {}  # empty: the server has one tenant
        self._max_gap_s = max_gap_s
        self._rows_s, self._prompts_s = 0.0, 0.0  # taken where there is one tenant

    def want(self, tenant: TenantQueue, request: Request) -> None:
        """Adds a request to the step that the tenant would get alone. Decoding ones come first."""
        share = self._shares.setdefault(tenant, _Share(self._n_tokens))
        n_tokens = min(request.n_together(request.n_computed), share.n_tokens)
        share.n_tokens -= n_tokens
        share.wants_more = request.status is RequestStatus.WAITING
        seconds = self._cost.chunk_s(request.n_computed, n_tokens)
        if n_tokens == 1:
            share.rows_s += seconds
        else:
            share.prompts_s += seconds

    def divide(self) -> None:
        """Divides the step's seconds by weight and by what each tenant wants."""
        fixed_s, limit_s = self._cost.fixed_s, _MAX_LONE_S
        weight = sum(tenant.share.weight for tenant in self._shares)
        least_debt = min((t.debt_s / t.share.weight for t in self._shares), default=0.0)
        if len(self._shares) > 1:
            limit_s = max(_MAX_SHARED_S, 2 * fixed_s)
            for tenant, share in self._shares.items():
                fair_s = (fixed_s + share.rows_s + share.prompts_s) * weight / tenant.share.weight
                limit_s = min(limit_s, _SLOWDOWN * fair_s)
        if rows_s := sum(share.rows_s for share in self._shares.values()):
            limit_s = min(limit_s, self._gap_s(fixed_s + rows_s))
        left_s = limit_s - fixed_s
        for tenant in sorted(self._shares, key=self._wanted_by_weight):
            share = self._shares[tenant]
            allotted_s = min(share.wanted_s, left_s * tenant.share.weight / weight)
            debt_s = tenant.debt_s - least_debt * tenant.share.weight
            share.left_s = allotted_s - debt_s + _ROUNDING
            share.may_exceed = share.left_s > 0
            share.kept_s = max(0.0, min(share.prompts_s, share.left_s / 2))
            left_s -= allotted_s
            weight -= tenant.share.weight

    def settle(self) -> None:
        """Records the excess of each tenant over its share as a debt. Called after all ``take``."""
        for tenant, share in self._shares.items():
            tenant.debt_s = max(0.0, -share.left_s)

    def may_start(self, tenant: TenantQueue) -> bool:
        """Return True unless running requests of the tenant lack seconds in this step."""
        return tenant not in self._shares or not self._shares[tenant].is_used_up

    def take(self, tenant: TenantQueue, request: Request) -> int:
        """Take as many of the request's next tokens as fit, and return their number.

        Unless the tenant has debts, some tokens of its first row and of its first prompt fit. A
        block of tokens that see one another is never divided, even if it exceeds the step.
        """
        start = request.n_computed
        n_wanted = request.n_together(start)
        n_tokens = min(n_wanted, self.n_left)
        if self._whole_prompts and n_tokens < n_wanted:
            n_tokens = n_wanted if self._is_empty else 0
        share = self._shares.get(tenant)
        if share is not None and n_tokens:
            n_tokens = request.without_cut(start, self._fitting(share, start, n_tokens))
            share.left_s -= self._cost.chunk_s(start, n_tokens)
        elif share is None and not self._whole_prompts and n_tokens:
            n_tokens = request.without_cut(start, self._take_alone(start, n_tokens))
        self._is_empty = self._is_empty and n_tokens == 0
        self.n_left = max(0, self.n_left - n_tokens)
        return n_tokens

    def give_back(self, tenant: TenantQueue, start: int, n_tokens: int) -> None:
        """Reverts ``take`` for a preempted request."""
        self.n_left += n_tokens
        if tenant in self._shares:
            self._shares[tenant].left_s += self._cost.chunk_s(start, n_tokens)

    def _take_alone(self, start: int, n_tokens: int) -> int:
        """Return how many tokens fit beside the rows. A prompt that is cut ends the step."""
        if n_tokens == 1:
            self._rows_s += self._cost.chunk_s(start, 1)
            return 1
        if not self._rows_s:
            return n_tokens
        step_s = self._cost.fixed_s + self._rows_s
        left_s = self._gap_s(step_s) - step_s - self._prompts_s
        n_fitting = self._cost.n_fitting(start, n_tokens, left_s)
        if n_fitting < n_tokens:
            self.n_left = 0
            n_fitting = max(n_fitting, 0 if self._prompts_s else min(_MIN_CHUNK, n_tokens))
        self._prompts_s += self._cost.chunk_s(start, n_fitting)
        return n_fitting

    def _gap_s(self, rows_step_s: float) -> float:
        """Return how long prompts may make a step that takes ``rows_step_s`` without them."""
        return max(self._max_gap_s, _MAX_TIMES * rows_step_s)

    def _wanted_by_weight(self, tenant: TenantQueue) -> float:
        return self._shares[tenant].wanted_s / tenant.share.weight

    def _fitting(self, share: _Share, start: int, n_tokens: int) -> int:
        is_row = n_tokens == 1
        if not is_row:
            share.kept_s = 0.0
        n_fitting = self._cost.n_fitting(start, n_tokens, share.left_s - share.kept_s)
        n_least = n_tokens if self._whole_prompts else min(_MIN_CHUNK, n_tokens)
        if n_fitting < n_least:
            n_fitting = n_least if share.may_exceed and is_row not in share.begun else 0
        share.begun.add(is_row)
        share.is_used_up |= n_fitting < n_tokens
        return n_fitting
