"""Where a model can run: a pure choice over offers, with the reason when there is none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from market.catalog import Model, find
from market.types import Deployment, Offer

MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Placement:
    """A place on an offer; ``gpu_milli`` 0 means on its CPUs."""

    offer: Offer
    gpu_milli: int


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why nothing fits, as a sentence for people."""

    reason: str


def place(
    model: Model,
    offers: Sequence[Offer],
    deployed: Iterable[Deployment],
    fitting: Sequence[Model],
    replicas: int = 1,
) -> Placement | Misfit:
    """The first offer with room for all replicas, GPUs before CPUs; ties end on offer ids.

    ``fitting`` are models to propose in the reason if this one does not fit.
    """
    held = list(deployed)
    ordered = sorted(offers, key=lambda offer: (not offer.gpus, offer.offer_id))
    for offer in ordered:
        share = _gpu_share(model, offer, held, replicas)
        if share is not None:
            return Placement(offer, share)
        needed = replicas * model.memory_mib
        if not offer.gpus and model.runs_on_cpu and needed <= free_memory_mib(offer, held):
            return Placement(offer, 0)
    names = [other.name for other in fitting if other.name != model.name]
    hint = f"; what would fit: {', '.join(names)}" if names else ""
    times = f"{replicas} times " if replicas > 1 else ""
    return Misfit(f"{model.name} needs {times}{_need(model)}; {_have(offers, held)}{hint}")


def that_fit(
    models: Sequence[Model], offers: Sequence[Offer], deployed: Iterable[Deployment]
) -> list[Model]:
    """The models of the catalog that could be placed right now."""
    held = list(deployed)
    return [m for m in models if isinstance(place(m, offers, held, ()), Placement)]


def _gpu_share(
    model: Model, offer: Offer, deployed: Iterable[Deployment], replicas: int
) -> int | None:
    """Thousandths of one GPU per replica, None if the offer has not room for all of them."""
    if not offer.gpus:
        return None
    smallest = min(gpu.memory_mib for gpu in offer.gpus)
    share = -(-model.memory_mib * 1000 // smallest)
    if share > 1000:
        return None
    room = sum(free // share for free in free_milli(offer, deployed).values())
    return share if room >= replicas else None


def free_memory_mib(offer: Offer, deployed: Iterable[Deployment]) -> int:
    """Memory of a node without GPUs less what the models on it need."""
    held = [d.replicas * find(d.model).memory_mib for d in deployed if d.offer_id == offer.offer_id]
    return offer.memory_mib - sum(held)


def free_milli(offer: Offer, deployed: Iterable[Deployment]) -> dict[int, int]:
    """Thousandths left on each GPU after first-fit of what runs there, oldest first."""
    free = {gpu.index: 1000 for gpu in offer.gpus}
    for deployment in sorted(deployed, key=lambda d: (d.created_at, d.deployment_id)):
        for _ in range(deployment.replicas if deployment.offer_id == offer.offer_id else 0):
            for index in free:
                if free[index] >= deployment.gpu_milli:
                    free[index] -= deployment.gpu_milli
                    break
    return free


def _need(model: Model) -> str:
    gib = _gib(model.memory_mib)
    if model.runs_on_cpu:
        return f"{gib} GiB of memory or 1 GPU with {gib} GiB free"
    return f"1 GPU with {gib} GiB free"


def _have(offers: Sequence[Offer], deployed: Sequence[Deployment]) -> str:
    free = [
        gpu.memory_mib * free_milli(offer, deployed)[gpu.index] // 1000
        for offer in offers
        for gpu in offer.gpus
    ]
    if free:
        return f"the freest of this cluster's {len(free)} has {max(free) // MIB_PER_GIB} GiB"
    memory = max((free_memory_mib(offer, deployed) for offer in offers), default=0)
    return f"this cluster has none (its freest node has {memory // MIB_PER_GIB} GiB of memory left)"


def _gib(mib: int) -> int:
    return -(-mib // MIB_PER_GIB)
