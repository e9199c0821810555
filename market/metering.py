"""What is asked and admitted, what is counted of it, and the usage record of it. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import msgspec

from market import pricing
from market.routing import Choice
from market.slices import PurseKey, Reservation
from market.types import (
    EngineChunk,
    FinishReason,
    Grammar,
    Lane,
    Principal,
    RateCard,
    Route,
    Sampling,
    TokenCounts,
    UsageQuality,
    UsageRecord,
)

CLAIM_MAX = 2**62
LENT_BY = "lent_by"  # of a record's attrs
NOT_TAKEN = "not_taken"  # the names of those begin so that say what a request would have cost
DEFAULT_SAMPLING = Sampling(None)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be generated: ``answers`` of them for each of the prompts (token ids).

    ``chat`` is the chat request as JSON, if the engine is to parse the model's answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    answers: int = 1
    grammar: Grammar | None = None
    chat: bytes | None = None
    embeds: bool = False
    stream: bool = True

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts; each counts once, however many answers it gets."""
        return sum(map(len, self.prompts))

    @property
    def can_move(self) -> bool:
        """Whether an answer that was begun can go on elsewhere as if nothing had happened.

        That is so if what comes next depends on the tokens so far alone, not on what an engine
        remembers of them.
        """
        sampling = self.sampling
        plain = msgspec.structs.replace(
            DEFAULT_SAMPLING,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            logit_bias=sampling.logit_bias,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        parsed = self.grammar is not None or self.chat is not None
        return self.count == 1 and not parsed and not self.embeds and sampling == plain

    @property
    def count(self) -> int:
        """Answers in all; number i is of prompt ``i // answers``."""
        return len(self.prompts) * self.answers


@dataclass(slots=True)
class Admission:
    """A request that may be served: its replica, its price and the money reserved for it.

    ``route`` is the replica that was asked last. ``draft`` is its record if it is never finished;
    on a lease nothing is reserved. ``on_record`` is told the record, which every admitted request
    has in the end.
    """

    request_id: str
    principal: Principal
    choice: Choice
    route: Route
    card: RateCard
    ask: Ask
    draft: UsageRecord
    output_limit: int
    key: PurseKey
    reservation: Reservation | None
    started_at: datetime
    arrived_s: float
    limited_by_money: bool = False
    # Set when it is us, not the client, who break the answer off: then nothing is charged.
    is_broken: bool = False
    on_record: Callable[[UsageRecord], None] | None = None


class Meter:
    """Counts what the gateway received from the engine: the basis of the bill."""

    def __init__(self, admission: Admission) -> None:
        self._ask = admission.ask
        self._arrived_s = admission.arrived_s
        self._cached = [0] * len(admission.ask.prompts)
        self.output = [0] * admission.ask.count
        self._claimed: list[int | None] = [None] * admission.ask.count
        self._replica: str | None = None
        self._served_tokens: int | None = None
        self.dispatched_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def counts(self) -> TokenCounts:
        """Token counts so far; cached ones are the replica's word, capped at the input."""
        return TokenCounts(self._ask.input_tokens, sum(self._cached), sum(self.output))

    @property
    def begun(self) -> TokenCounts:
        """The same, with the prompts only that are known to be prefilled: a token came of them."""
        per_prompt = zip(self._ask.prompts, self._outputs(), strict=True)
        prefilled = sum(len(prompt) for prompt, outputs in per_prompt if any(outputs))
        return TokenCounts(prefilled, min(sum(self._cached), prefilled), sum(self.output))

    def _outputs(self) -> list[list[int]]:
        each = self._ask.answers
        return [self.output[n : n + each] for n in range(0, len(self.output), each)]

    @property
    def claimed_output_tokens(self) -> int | None:
        """The replica's own count of all answers."""
        known = [count for count in self._claimed if count is not None]
        return sum(known) if known else None

    @property
    def ttft_s(self) -> float:
        """From dispatch to the first token; 0 before it."""
        return (self.first_token_s or 0.0) - (self.dispatched_s or self.first_token_s or 0.0)

    def add(self, chunk: EngineChunk, now_s: float) -> bool:
        """Count one chunk; whether it brought the first token."""
        answer, (prompt, nth) = chunk.index, divmod(chunk.index, self._ask.answers)
        is_first = bool(chunk.token_ids) and self.first_token_s is None
        if is_first:
            self.first_token_s = now_s
        self.output[answer] += len(chunk.token_ids)
        if nth == 0:  # the others find the prompt in the cache because of this one
            length = len(self._ask.prompts[prompt])
            self._cached[prompt] = _within(chunk.counts.cached_input_tokens, length)
        self._claimed[answer] = _within(chunk.counts.output_tokens, CLAIM_MAX)
        if chunk.replica is not None:
            self._replica = chunk.replica
        if chunk.served_tokens is not None:
            self._served_tokens = chunk.served_tokens
        return is_first

    def evidence(self) -> tuple[tuple[str, str], ...]:
        """Which replica answered, and its own total: the ledger compares it with its rows."""
        if self._replica is None:
            return ()
        if self._served_tokens is None:
            return (("replica", self._replica),)
        return ("replica", self._replica), ("served_tokens", str(self._served_tokens))

    def elapsed_ms(self, until_s: float | None) -> int | None:
        """Milliseconds from the request's arrival; None if it never came so far."""
        return None if until_s is None else round((until_s - self._arrived_s) * 1000)


# Of several answers the one that ended last in this order says why the request ended.
TELLING = (
    FinishReason.STOP,
    FinishReason.TOOL_CALLS,
    FinishReason.LENGTH,
    FinishReason.BUDGET,
)


def final_reason(admission: Admission, reported: FinishReason) -> FinishReason:
    """``length`` for want of money is ``budget`` in the ledger."""
    if reported is FinishReason.LENGTH and admission.limited_by_money:
        return FinishReason.BUDGET
    return reported


def make_record(
    admission: Admission,
    meter: Meter,
    outcome: FinishReason,
    finished_at: datetime,
    finished_s: float,
) -> UsageRecord:
    """The usage record of a request that has ended."""
    gone = outcome is FinishReason.CLIENT_DISCONNECT
    counts, route = meter.begun if gone else meter.counts, admission.route
    return msgspec.structs.replace(
        admission.draft,
        # Where it really ran, which another provider may own than that of the draft.
        deployment_id=route.deployment_id,
        provider_id=route.provider_id,
        node_id=route.node_id,
        gpu_type=route.gpu_type,
        gpu_milli=route.gpu_milli,
        lease_id=route.lease_id if route.loan is None else route.loan.lease_id,
        finished_at=finished_at,
        input_tokens=counts.input_tokens,
        cached_input_tokens=counts.cached_input_tokens,
        output_tokens=counts.output_tokens,
        charge_pico=pricing.charge(counts, admission.card, outcome, route.lane),
        finish_reason=outcome,
        usage_quality=UsageQuality.ENGINE,
        claimed_output_tokens=meter.claimed_output_tokens,
        queue_ms=meter.elapsed_ms(meter.dispatched_s),
        ttft_ms=meter.elapsed_ms(meter.first_token_s),
        duration_ms=meter.elapsed_ms(finished_s),
        attrs=(
            *admission.draft.attrs,
            *meter.evidence(),
            *_lender(route),
            *_not_taken(admission, counts, outcome),
        ),
    )


def _lender(route: Route) -> tuple[tuple[str, str], ...]:
    """Who has a part of what is charged: the holder of the lease on which it was generated."""
    return () if route.loan is None else ((LENT_BY, route.loan.tenant_id),)


def _not_taken(
    admission: Admission, counts: TokenCounts, outcome: FinishReason
) -> tuple[tuple[str, str], ...]:
    """What the same tokens would have cost where the request was not sent."""
    card = admission.choice.not_taken
    if card is None:
        return ()
    charge = pricing.charge(counts, card, outcome, Lane.TOKENS)
    return (
        (NOT_TAKEN, card.model),
        (f"{NOT_TAKEN}_price_id", card.price_id),
        (f"{NOT_TAKEN}_charge", pricing.format_money(charge)),
    )


def _within(claimed: int, most: int) -> int:
    """A replica's word, made fit for the books."""
    return max(0, min(claimed, most))
