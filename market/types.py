"""The nouns. Frozen values without behaviour beyond derived properties; no I/O, no clock.

Money is an integer of pico units (10^-12 of the currency) everywhere inside the market.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import msgspec

CURRENCY = "USD"
TERM_MAX_S = 182 * 86_400
APP_PREFIX = "model-"


class Mode(StrEnum):
    """How a deployment is made available."""

    TOKENS = "tokens"
    LEASE = "lease"
    HYBRID = "hybrid"
    AUTO = "auto"


_GPU_FIELDS = frozenset(("gpus", "gpu_type", "gpu_memory_gib", "region", "provider_id"))
_ORDER_FIELDS = _GPU_FIELDS | frozenset(
    ("engine", "term", "start", "max_price", "resale", "tenant_id", "order_id", "queue")
)
# What can be said of a deployment in each mode, besides its model.
MODE_FIELDS: dict[Mode, frozenset[str]] = {
    Mode.TOKENS: frozenset(("engine", "replicas", "keep_alive", "max_spend")),
    Mode.LEASE: _ORDER_FIELDS,
    Mode.HYBRID: _ORDER_FIELDS | {"spill_budget", "ttft_s"},
    Mode.AUTO: frozenset(("tenant_id", "ttft_s", "cheap", "strong", "cost_target")),
}


class Lane(StrEnum):
    """How one request was served."""

    LEASE = "lease"
    TOKENS = "tokens"
    SPILL = "spill"
    JOB = "job"


# Lanes of pools: a lease on which they were served is one that was lent.
SHARED = (Lane.TOKENS, Lane.SPILL)


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


class Period(StrEnum):
    """The stretch of time that a budget is for; ``total`` never begins anew."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a key, a tenant or a hybrid's spill (``subject``) may spend in a period."""

    subject: str
    period: Period
    limit_pico: int


class KeyPolicy(msgspec.Struct, frozen=True):
    """What a key may do besides its role. None: no limit.

    A ``read_only`` key reads, but buys and changes nothing. Limits are for all gateways together.
    """

    models: tuple[str, ...] | None = None
    lanes: tuple[Lane, ...] | None = None
    read_only: bool = False
    expires_at: datetime | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent: int | None = None


UNLIMITED = KeyPolicy()


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated API key. ``subject_id`` is the tenant's or provider's id.

    ``weight`` is the tenant's share of contended pools; ``budgeted`` keys have money of their own
    set aside, because what they may spend is less than what the tenant has. ``secret_until``: the
    key was rotated, and this was its old secret, good until then.
    """

    api_key_id: str
    role: Role
    subject_id: str
    policy: KeyPolicy = UNLIMITED
    weight: int = 1
    budgeted: bool = False
    secret_until: datetime | None = None


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
class Access:
    """What gateways keep at hand: a number that changes with every key, budget or tenant, and the
    prices in force.
    """

    version: str
    cards: tuple[RateCard, ...]


class TokenCounts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``input_tokens`` includes ``cached_input_tokens``."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters under the names engines use.

    ``max_tokens`` None: as many as the context and the balance allow. ``logprobs`` and
    ``prompt_logprobs``: how many alternatives per token, None for none at all.
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
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class GrammarKind(StrEnum):
    """What the text of an answer must follow."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """A constraint on the answer; ``text`` is the schema, expression or choices (JSON list)."""

    kind: GrammarKind
    text: str = ""


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """What an engine is asked: token ids in, so that gateway and engine count the same.

    ``chat``, if there is one, is the chat request as JSON: the engine then turns its text into
    tool calls and reasoning by the model's own parsers. With ``embeds`` a vector is wanted. Without
    ``stream`` nobody reads the answer before its end. The last ``resumed`` tokens of the prompt are
    of the answer, which was begun elsewhere; limits and counts are those of the whole. One that is
    ``borrowed`` uses a lease of somebody else's, as long as that one asks for nothing.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str
    grammar: Grammar | None = None
    chat: bytes | None = None
    embeds: bool = False
    stream: bool = True
    resumed: int = 0
    borrowed: bool = False


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token and how likely it was; ``text`` is the token alone, perhaps half a character."""

    token_id: int
    text: str
    logprob: float


class Position(msgspec.Struct, frozen=True, array_like=True):
    """One place of an answer or prompt: the token there and the likeliest alternatives."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class EngineChunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of an answer. The counts are the engine's own and cumulative.

    ``finish_reason`` is None until the last chunk; then ``stop``, ``length`` or ``tool_calls``.
    The first chunk names its ``replica``; a last one may say how many tokens that has delivered in
    all streams. ``deltas`` are pieces of a chat message as JSON objects, in place of ``text``,
    where the request asked for parsing. ``prompt_logprobs`` come with the first chunk; the first
    token of a prompt has none. ``index`` tells the answers of one request apart.
    An ``embedding`` is a vector of little-endian 32-bit floats. With ``wants`` the answer stands
    still until so many output tokens in all are paid for.
    """

    text: str
    token_ids: tuple[int, ...]
    counts: TokenCounts
    finish_reason: FinishReason | None = None
    replica: str | None = None
    served_tokens: int | None = None
    logprobs: tuple[Position, ...] | None = None
    deltas: tuple[bytes, ...] | None = None
    prompt_logprobs: tuple[Position | None, ...] | None = None
    stop_reason: int | str | None = None
    index: int = 0
    embedding: bytes | None = None
    wants: int | None = None


@dataclass(frozen=True, slots=True)
class Loan:
    """A lease whose idle time is sold, and its holder, who has a part of the price."""

    lease_id: str
    tenant_id: str


@dataclass(frozen=True, slots=True)
class Route:
    """A replica that serves a model, and what the ledger writes about the place.

    Only keys of ``tenant_id`` may use it, if there is one: the holder of the lease. ``places`` is
    how many answers the replica can generate at once. A model that ``embeds`` does nothing else.
    On a ``loan`` it is a lease's replica that serves its model's pool while its holder is idle.
    """

    model: str
    lane: Lane
    deployment_id: str
    app_name: str
    max_context_tokens: int
    provider_id: str
    node_id: str
    gpu_type: str
    gpu_milli: int
    tenant_id: str | None = None
    lease_id: str | None = None
    places: int = 128
    embeds: bool = False
    reasoning_parser: str = ""
    loan: Loan | None = None


@dataclass(frozen=True, slots=True)
class NotReady:
    """A deployment that cannot be asked now, and why; if it ``wakes``, a request starts it."""

    model: str
    deployment_id: str
    tenant_id: str | None
    reason: str
    wakes: bool = False


@dataclass(frozen=True, slots=True)
class LanePolicy:
    """How a lane is chosen for each request of a hybrid or auto deployment.

    The first token is wanted within ``ttft_s``. Spills cost at most ``spill_pico`` a day (None:
    any). With two models, easy requests go to the ``cheap`` one, so that all together cost about
    ``cost_target`` of what the ``strong`` one alone would.
    """

    ttft_s: float
    spill_pico: int | None = None
    cheap: str = ""
    strong: str = ""
    cost_target: float = 0.5


@dataclass(frozen=True, slots=True)
class Rule:
    """What a tenant's requests for ``model`` (or a name of its own) are routed by.

    ``lease_id``: a hybrid's own lease.
    """

    model: str
    tenant_id: str
    deployment_id: str
    policy: LanePolicy
    lease_id: str | None = None


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Routes that can be used, one per replica, deployments without one, and rules of tenants.

    ``lent`` are leases' replicas that serve pools as well. ``early`` are those of pools that start
    or wake in a process which was there before: they may be used as soon as they say that they are
    awake. Processes on ``standby`` (applications) may have to start next. So many ``gateways`` use
    them.
    """

    ready: tuple[Route, ...]
    starting: tuple[NotReady, ...]
    rules: tuple[Rule, ...] = ()
    lent: tuple[Route, ...] = ()
    early: tuple[Route, ...] = ()
    standby: tuple[str, ...] = ()
    gateways: int = 1


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Money to set aside: ``wanted_pico``, or as much as there is from ``minimum_pico`` on.

    Records draw on it (a token slice, a lease's hour) and name it as their ``slice_id``. With an
    ``api_key_id`` the key's budgets bound it, too, and so does a ``cap``; with a ``pack_id`` the
    money is that of a token pack.
    """

    hold_id: str
    producer: str
    epoch: int
    tenant_id: str
    wanted_pico: int
    minimum_pico: int
    model: str
    lane: Lane
    currency: str
    started_at: datetime
    api_key_id: str | None = None
    pack_id: str | None = None
    cap: Budget | None = None


@dataclass(frozen=True, slots=True)
class HoldChange:
    """A hold's new amount in all: ``wanted_pico``, or as much as there is from the minimum on.

    Changes are numbered by the hold's owner; one that comes late is left out.
    """

    hold_id: str
    version: int
    wanted_pico: int
    minimum_pico: int


@dataclass(frozen=True, slots=True)
class SliceAsk:
    """A gateway wants a slice (``opens``) or more of one that it has (``changes``).

    ``output_pico`` is the price of an output token, ``weight`` the tenant's. ``has_pico`` was
    granted before: requests reserve from it meanwhile, so that an answer may not be less.
    """

    producer: str
    epoch: int
    tenant_id: str
    model: str
    weight: int
    output_pico: int
    has_pico: int = 0
    opens: HoldRequest | None = None
    changes: HoldChange | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """Tokens of one model, bought ahead at a price of their own (``price_id``) until they expire.

    ``tokens`` are output tokens; input counts less, in proportion to its price.
    """

    pack_id: str
    tenant_id: str
    model: str
    price_id: str
    tokens: int
    currency: str
    bought_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class PackLeft:
    """A pack that can still be drawn on, at ``card``'s prices, and what no hold has claimed."""

    pack: Pack
    card: RateCard
    available_pico: int


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


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU of a node. GPUs of one ``domain`` are joined by NVLink."""

    index: int
    gpu_type: str
    memory_mib: int
    domain: int = 0


class OfferState(StrEnum):
    """Whether an offer can be matched: only an open one."""

    OPEN = "open"
    DRAINING = "draining"
    LOST = "lost"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Offer:
    """A provider's node with its asking price in pico units per GPU-hour.

    ``logical`` GPUs were declared, not found by a driver: models run on the node's CPUs.
    ``models_dir`` is a folder on the node. The price is in force since ``priced_at``.
    """

    offer_id: str
    provider_id: str
    node_id: str
    gpu_type: str
    gpus: tuple[Gpu, ...]
    cpu_count: int
    memory_mib: int
    ask_pico: int
    currency: str
    priced_at: datetime
    region: str = "local"
    logical: bool = False
    models_dir: str = ""
    available_from: datetime | None = None
    available_until: datetime | None = None
    term_min_s: int = 0
    term_max_s: int = TERM_MAX_S
    state: OfferState = OfferState.OPEN
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something runs: a share of GPUs of a node, or its CPUs (no indices, share 0)."""

    offer_id: str
    node_id: str
    gpu_indices: tuple[int, ...] = ()
    gpu_milli: int = 0


class OrderState(StrEnum):
    """A queued order waits until it is matched or cancelled; others are matched or refused."""

    WAITING = "waiting"
    MATCHED = "matched"
    REFUSED = "refused"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Order:
    """GPUs that a tenant wants for a model. ``order_id`` is the caller's: again is the same order.

    ``gpu_count`` GPUs, ``gpu_milli`` thousandths of each (less than 1000 only for one GPU).
    ``start`` None: now. ``max_price_pico`` is per GPU-hour. With a ``policy`` it is for a hybrid.
    """

    order_id: str
    tenant_id: str
    api_key_id: str
    model: str
    engine: str
    gpu_count: int
    gpu_milli: int
    start: datetime | None
    term_s: int
    created_at: datetime
    gpu_type: str | None = None
    gpu_memory_mib: int | None = None
    max_price_pico: int | None = None
    region: str | None = None
    provider_id: str | None = None
    resale: bool = False
    policy: LanePolicy | None = None
    state: OrderState = OrderState.WAITING
    reason: str = ""
    lease_id: str | None = None

    @property
    def content(self) -> tuple[object, ...]:
        """What must be the same when an order id comes again."""
        place = (self.gpu_count, self.gpu_milli, self.gpu_type, self.gpu_memory_mib, self.region)
        terms = (self.start, self.term_s, self.max_price_pico, self.provider_id, self.resale)
        return (self.tenant_id, self.model, self.engine, *place, *terms, self.policy)


class LeaseState(StrEnum):
    """Life of a lease: booked; its replica has served; over."""

    PENDING = "pending"
    ACTIVE = "active"
    CLOSED = "closed"


class CloseReason(StrEnum):
    """Why a lease is over."""

    EXPIRED = "expired"
    RELEASED = "released"
    OUT_OF_FUNDS = "out_of_funds"
    NODE_LOST = "node_lost"
    NODE_LEFT = "node_left"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Lease:
    """A contract for GPUs over ``[start, end)`` at a price frozen at the match.

    A ``floating`` one is a booking of any one GPU of the node: ``gpu_indices`` come at its start.
    Time before ``metered_until`` is decided: ``healthy_us`` of it was charged as ``gpu_us``,
    ``credited_us`` was not. ``run_replica`` serves without a break since ``run_since``. Money is
    held hour by hour: ``hold_index`` is the newest hold (-1: none yet), which pays for the time
    from ``hold_from`` to ``covered_until``; ``ended_index`` is the newest that has ended.
    """

    lease_id: str
    order_id: str
    tenant_id: str
    api_key_id: str
    model: str
    engine: str
    offer_id: str
    provider_id: str
    node_id: str
    gpu_type: str
    gpu_indices: tuple[int, ...]
    gpu_count: int
    gpu_milli: int
    price_id: str
    gpu_hour_pico: int
    currency: str
    start: datetime
    end: datetime
    created_at: datetime
    metered_until: datetime
    hold_from: datetime
    covered_until: datetime
    floating: bool = False
    resale: bool = False
    state: LeaseState = LeaseState.PENDING
    close_reason: CloseReason | None = None
    reason: str = ""
    activated_at: datetime | None = None
    closed_at: datetime | None = None
    noticed_at: datetime | None = None
    run_replica: str | None = None
    run_since: datetime | None = None
    healthy_us: int = 0
    credited_us: int = 0
    gpu_us: int = 0
    charged_pico: int = 0
    hold_index: int = -1
    ended_index: int = -1

    @property
    def total_milli(self) -> int:
        """Thousandths of a GPU in all."""
        return self.gpu_count * self.gpu_milli

    @property
    def place(self) -> Place:
        """Where it runs."""
        return Place(self.offer_id, self.node_id, self.gpu_indices, self.gpu_milli)

    def hold_id(self, index: int) -> str:
        """Id of its hold number ``index``."""
        return f"{self.lease_id}-hold-{index}"


class ReplicaState(StrEnum):
    """Life of a replica. Its GPUs are taken until it is gone: freed means seen free.

    A ``draining`` one gets no more requests, ends the answers that it has, and may be taken back.
    One that is ``asleep`` has its process and, in the host's memory, its weights, but no GPU.
    """

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    FAILED = "failed"
    STOPPING = "stopping"
    FREEING = "freeing"


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine at one place: a Serve application of its own. ``reason`` explains the state.

    ``process`` is the spare process that it was given; it has its own otherwise.
    """

    replica_id: str
    deployment_id: str
    place: Place
    state: ReplicaState
    reason: str
    created_at: datetime
    process: str = ""

    @property
    def process_id(self) -> str:
        """What its processes carry in their environment."""
        return self.process or self.replica_id

    @property
    def app_name(self) -> str:
        """Name of the Ray Serve application that runs it."""
        return app_name(self.process_id)


def app_name(process_id: str) -> str:
    """Name of the Ray Serve application of a process that runs models."""
    return f"{APP_PREFIX}{process_id}"


@dataclass(frozen=True, slots=True)
class Spare:
    """A process of an engine that waits for a model, with all imports behind it."""

    process: str
    offer_id: str
    node_id: str
    engine: str


class DeploymentState(StrEnum):
    """What its replicas amount to."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ASLEEP = "asleep"
    COLD = "cold"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many replicas a pool may have, and what they may cost.

    ``spend_max_pico``: for its GPUs, an hour; None: any. ``keep_alive_s``: how long idle replicas
    above ``minimum`` stay; None: by break-even (autoscaling.py).
    """

    minimum: int = 1
    maximum: int = 1
    spend_max_pico: int | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model made available: to everybody (``tokens``) or to one tenant.

    A lease's and a hybrid's replicas run on its lease; an ``auto`` one has none: its ``policy``
    deals requests for ``model``, which may be a name of the tenant's own, to others. ``made``:
    replicas so far; a name never comes again.
    """

    deployment_id: str
    model: str
    mode: Mode
    engine: str
    bounds: Bounds
    created_at: datetime
    tenant_id: str | None = None
    lease_id: str | None = None
    policy: LanePolicy | None = None
    stopping: bool = False
    made: int = 0


class StartFrom(StrEnum):
    """What there was of a replica before it started.

    Nothing; its weights in the host's memory (the page cache); a process with the imports behind
    it; a whole engine that slept.
    """

    COLD = "cold"
    HOST = "host"
    SPARE = "spare"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class StartCost:
    """How long starts of a model with an engine on a type of GPU took: a moving mean.

    ``start_id`` is "model/engine/type/from".
    """

    start_id: str
    seconds: float
    count: int
    measured_at: datetime


class StoredState(StrEnum):
    """What there is of a model on a disk; one put there by hand is never touched."""

    READY = "ready"
    PULLING = "pulling"
    PARTIAL = "partial"
    FAILED = "failed"
    BY_HAND = "by_hand"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on a node's disk.

    ``total_bytes`` is what it will have; ``used_s`` the time of the last use, in Unix seconds. Who
    is ``pinned`` or ``in_use`` is not evicted. ``message`` says why a pull failed. ``cached``: the
    share of its weights that is in the host's memory.
    """

    model: str
    state: StoredState
    bytes: int
    total_bytes: int
    used_s: float
    pinned: bool = False
    in_use: bool = False
    message: str = ""
    cached: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class AppStatus:
    """What Serve says of an application.

    ``run`` identifies the process that serves; None if none does. Serve may replace it. It has the
    settings of ``replica_id``, which are in force; "" for a spare. After its controller's restart
    Serve is ``unsure`` whether the process that served still does.
    """

    run: str | None
    failed: bool
    message: str
    replica_id: str = ""
    asleep: bool = False
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What was seen of the cluster: nodes that live, and applications by name."""

    nodes: frozenset[str]
    apps: Mapping[str, AppStatus]
