"""The nouns. Frozen values without behaviour beyond derived properties; no I/O, no clock.

Money is an integer of pico units (10^-12 of the currency) everywhere inside the market.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import msgspec

CURRENCY = "USD"


class Mode(StrEnum):
    """How a deployment is made available."""

    TOKENS = "tokens"
    LEASE = "lease"
    HYBRID = "hybrid"
    AUTO = "auto"


class Lane(StrEnum):
    """How one request was served."""

    LEASE = "lease"
    TOKENS = "tokens"
    SPILL = "spill"
    JOB = "job"


class RecordKind(StrEnum):
    """What a row of the usage ledger stands for."""

    TOKENS = "tokens"
    GPU = "gpu"
    ADJUSTMENT = "adjustment"
    REVERSAL = "reversal"


class FinishReason(StrEnum):
    """Why a response ended, as the ledger says it."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    BUDGET = "budget"
    CLIENT_DISCONNECT = "client_disconnect"
    PROVIDER_ERROR = "provider_error"
    MARKET_FAULT = "market_fault"


class UsageQuality(StrEnum):
    """Where the counts of a record come from."""

    ENGINE = "engine"
    RECOVERED = "recovered"


class Role(StrEnum):
    """Whom an API key speaks for."""

    OPERATOR = "operator"
    TENANT = "tenant"
    PROVIDER = "provider"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated API key. ``subject_id`` is the tenant's or provider's id."""

    api_key_id: str
    role: Role
    subject_id: str


@dataclass(frozen=True, slots=True)
class RateCard:
    """Dated prices: pico units per token (exact for <= 6 decimals per 1M) and per GPU-hour.

    ``price_id`` is a hash of the content, so an id can never come to mean another price.
    ``model`` is what is priced: a model, or an offer whose GPU time is sold.
    """

    price_id: str
    model: str
    input_pico: int
    cached_input_pico: int
    output_pico: int
    currency: str
    valid_from: datetime
    gpu_hour_pico: int = 0


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """``input_tokens`` includes ``cached_input_tokens``."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters under the names engines use.

    ``max_tokens`` None: as many as the context and the balance allow.
    """

    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked: token ids in, so that gateway and engine count the same."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str


@dataclass(frozen=True, slots=True)
class EngineChunk:
    """A piece of an answer. The counts are the engine's own and cumulative.

    ``finish_reason`` is None until the last chunk; then ``stop`` or ``length``. The first chunk
    names its ``replica``; a last one may say how many tokens that has delivered in all streams.
    """

    text: str
    token_ids: tuple[int, ...]
    counts: TokenCounts
    finish_reason: FinishReason | None = None
    replica: str | None = None
    served_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests for a model go, and what the ledger writes about the place."""

    model: str
    lane: Lane
    deployment_id: str
    app_name: str
    model_path: str
    max_context_tokens: int
    provider_id: str
    node_id: str
    gpu_type: str
    gpu_milli: int


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Routes that can be used, and (model, reason) of deployments that cannot yet."""

    ready: tuple[Route, ...]
    starting: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Money to set aside: ``wanted_pico``, or as much as there is from ``minimum_pico`` on.

    ``shared``: many records draw on it (a token slice, a lease's hour) and name it as their
    ``slice_id``; otherwise it is for one request, whose record ends it. The other fields are what
    that record needs if the gateway dies.
    """

    hold_id: str
    producer: str
    epoch: int
    tenant_id: str
    api_key_id: str
    wanted_pico: int
    minimum_pico: int
    model: str
    lane: Lane
    deployment_id: str
    provider_id: str
    node_id: str
    gpu_type: str
    gpu_milli: int
    price_id: str
    currency: str
    started_at: datetime
    shared: bool = False


class UsageRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One row of the usage ledger as its producer writes it.

    Its identity (producer, epoch, seq) is that of the batch and the place in it; the ledger adds
    lsn and booked_at. ``charge_pico`` is signed. Durations are milliseconds of a monotonic clock.
    A msgspec Struct, because one is made, spooled and encoded for every request.
    """

    kind: RecordKind
    request_id: str | None
    tenant_id: str
    api_key_id: str | None
    model: str | None
    lane: Lane
    deployment_id: str | None
    provider_id: str
    node_id: str | None
    gpu_type: str | None
    gpu_milli: int | None
    started_at: datetime
    finished_at: datetime
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    price_id: str
    charge_pico: int
    currency: str
    finish_reason: FinishReason | None
    usage_quality: UsageQuality = UsageQuality.ENGINE
    claimed_output_tokens: int | None = None
    queue_ms: int | None = None
    ttft_ms: int | None = None
    duration_ms: int | None = None
    reverses_lsn: int | None = None
    adapter: str | None = None
    lease_id: str | None = None
    slice_id: str | None = None
    gpu_us: int | None = None
    attrs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def for_hold(  # noqa: PLR0913  # what only the request's end decides; all by name
        cls,
        hold: HoldRequest,
        *,
        counts: TokenCounts,
        finished_at: datetime,
        charge_pico: int,
        finish_reason: FinishReason | None,
        usage_quality: UsageQuality = UsageQuality.ENGINE,
        claimed_output_tokens: int | None = None,
        queue_ms: int | None = None,
        ttft_ms: int | None = None,
        duration_ms: int | None = None,
        slice_id: str | None = None,
        attrs: tuple[tuple[str, str], ...] = (),
    ) -> "UsageRecord":
        """The record of a request that had ``hold``, or drew on the shared one ``slice_id``."""
        return cls(
            kind=RecordKind.TOKENS,
            request_id=hold.hold_id,
            tenant_id=hold.tenant_id,
            api_key_id=hold.api_key_id,
            model=hold.model,
            lane=hold.lane,
            deployment_id=hold.deployment_id,
            provider_id=hold.provider_id,
            node_id=hold.node_id,
            gpu_type=hold.gpu_type,
            gpu_milli=hold.gpu_milli,
            started_at=hold.started_at,
            finished_at=finished_at,
            input_tokens=counts.input_tokens,
            cached_input_tokens=counts.cached_input_tokens,
            output_tokens=counts.output_tokens,
            price_id=hold.price_id,
            charge_pico=charge_pico,
            currency=hold.currency,
            finish_reason=finish_reason,
            usage_quality=usage_quality,
            claimed_output_tokens=claimed_output_tokens,
            queue_ms=queue_ms,
            ttft_ms=ttft_ms,
            duration_ms=duration_ms,
            slice_id=slice_id,
            attrs=attrs,
        )


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU of a node."""

    index: int
    gpu_type: str
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Offer:
    """A provider's node with its asking price in pico units per GPU-hour."""

    offer_id: str
    provider_id: str
    node_id: str
    gpu_type: str
    gpus: tuple[Gpu, ...]
    cpu_count: int
    memory_mib: int
    ask_pico: int
    currency: str


class DeploymentState(StrEnum):
    """Life of a deployment: what should be, and what is."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model made available. ``reason`` says why it is in its state."""

    deployment_id: str
    model: str
    mode: Mode
    engine: str
    replicas: int
    offer_id: str
    gpu_milli: int
    state: DeploymentState
    reason: str
    created_at: datetime

    @property
    def app_name(self) -> str:
        """Name of the Ray Serve application that runs it."""
        return f"model-{self.deployment_id}"


@dataclass(frozen=True, slots=True)
class AppStatus:
    """What Serve says of an application: ``running`` if at least one replica serves."""

    running: bool
    failed: bool
    message: str
