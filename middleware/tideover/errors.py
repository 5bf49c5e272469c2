# SPDX-License-Identifier: Apache-2.0
"""Everything tideover raises on purpose.

    TideoverError
    ├── ConfigurationError    settings, a task or a route that cannot work; says what to change
    ├── InvalidJob            this job would not run with exactly the arguments it was sent with
    ├── CapacityReached       there is no room for one more job, in all or for its tenant; nothing was accepted
    ├── StoreUnavailable      Redis cannot be reached, or refuses to write; says whether a job may have been accepted
    ├── JobNotFound           no record of such a job
    ├── NotYet                the result of a job is not there yet, and why: an answer like HTTP 202
    ├── JobExpired            its answer would be useless by now; no call is made
    ├── JobFailed             what `wait_for` raises when the job ended without a result
    └── ProviderError         what a provider answered, where no SDK of that provider raises for it

A hold is no error: it travels as `HoldSignal` (`tideover.attempt`). All are dramatiq `MiddlewareError`s, because dramatiq
swallows any other exception of a hook.
"""

from __future__ import annotations

from typing import Any

from dramatiq.middleware import MiddlewareError


class TideoverError(MiddlewareError):
    """Base of all errors of tideover."""


class ConfigurationError(TideoverError, ValueError):
    """Settings, a task or a route that cannot work. The message names the key and says what to change."""


class InvalidJob(TideoverError, TypeError):
    """The job would not run with exactly the arguments it was sent with, so it was not accepted."""


class CapacityReached(TideoverError):
    """There is no room for one more job, so it was not accepted.

    Attributes:
      tenant: whose room is full; None: that of the namespace.
      limit: the jobs that may live at once.
    """

    def __init__(self, tenant: str | None, limit: int) -> None:
        self.tenant, self.limit = tenant, limit
        whose, name = ("the namespace has", "max_jobs") if tenant is None else (f"tenant {tenant} has", "max_jobs_per_tenant")
        super().__init__(
            f"{whose} {limit:,} jobs that have not ended, as many as capacity.{name} allows. Send it later, raise the limit, "
            'or set capacity.overflow = "expire_oldest"'
        )


class StoreUnavailable(TideoverError, ConnectionError):
    """Redis cannot be reached or refuses to write. Sending again is safe with an idempotency key, or if nothing was accepted.

    Attributes:
      may_be_accepted: what was being sent may have been accepted, because only the answer was lost; False: it was not.
      sent: what `send_many` had done before (a `Sent`); None elsewhere.
    """

    may_be_accepted: bool = False
    sent: Any = None


class JobNotFound(TideoverError, LookupError):
    """There is no record of this job: it never existed, or it ended so long ago that its story is gone."""


class NotYet(TideoverError):
    """The job has no result yet.

    Attributes:
      job_id: the job's id (dramatiq's message id).
      reason: why: `"timeout"`, or why it is held (`"outage"`, `"pace"`...).
      retry_after_s: when asking again makes sense, in seconds; None when nobody can tell.
    """

    def __init__(self, job_id: str, reason: str, retry_after_s: float | None) -> None:
        self.job_id, self.reason, self.retry_after_s = job_id, reason, retry_after_s
        when = "" if retry_after_s is None else f"; ask again in {retry_after_s:.0f} s"
        super().__init__(f"job {job_id} has no result yet ({reason}){when}. `tideover explain {job_id}` says more")


class JobExpired(TideoverError):
    """The instant after which the job's answer is useless has passed, so no call was made.

    Attributes:
      job_id: the job's id.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"job {job_id} is past its expiry; no call was made. Give it a longer expires_in if it may wait")


class JobFailed(TideoverError):
    """The job ended without a result.

    Attributes:
      job_id: the job's id.
      end: `"failed"`, `"expired"` or `"discarded"`.
    """

    def __init__(self, job_id: str, end: str, why: str) -> None:
        self.job_id, self.end = job_id, end
        super().__init__(f"job {job_id} {end}: {why}")


class ProviderError(TideoverError):
    """A provider's answer for which no SDK raises.

    Attributes:
      route: the route that answered.
      kind: the outcome's kind, as in `tideover.core.outcome`.
    """

    def __init__(self, route: str, kind: str, why: str) -> None:
        self.route, self.kind = route, kind
        super().__init__(f"route {route}: {why}")
