"""Rows of the scheduler's tables as values and back."""

import json
from dataclasses import asdict

from sqlalchemy import Connection, Row, delete, select, update

from market.scheduler import tables
from market.storage import upsert
from market.types import Deployment, DeploymentState, Gpu, Mode, Offer


def save_offer(connection: Connection, offer: Offer) -> None:
    """Add an offer or replace the one with its id."""
    row = asdict(offer) | {"gpus": json.dumps([asdict(gpu) for gpu in offer.gpus])}
    upsert(connection, tables.offers, [row])


def offers(connection: Connection) -> list[Offer]:
    """All offers, by id."""
    query = select(tables.offers).order_by(tables.offers.c.offer_id)
    return [_offer(row) for row in connection.execute(query)]


def save_deployment(connection: Connection, deployment: Deployment) -> None:
    """Add a deployment or replace the one with its id."""
    upsert(connection, tables.deployments, [asdict(deployment)])


def deployments(connection: Connection) -> list[Deployment]:
    """All deployments, oldest first."""
    table = tables.deployments
    query = select(table).order_by(table.c.created_at, table.c.deployment_id)
    return [_deployment(row) for row in connection.execute(query)]


def mark(connection: Connection, deployment_id: str, state: DeploymentState, reason: str) -> None:
    """Set state and reason; one that is being stopped stays so."""
    table = tables.deployments
    where = (table.c.deployment_id == deployment_id, table.c.state != DeploymentState.STOPPING)
    connection.execute(update(table).where(*where).values(state=state, reason=reason))


def forget(connection: Connection, deployment_id: str) -> None:
    """Delete a deployment."""
    table = tables.deployments
    connection.execute(delete(table).where(table.c.deployment_id == deployment_id))


def _offer(row: Row[tuple[object, ...]]) -> Offer:
    values = dict(row._mapping)
    gpus = tuple(Gpu(**gpu) for gpu in json.loads(values["gpus"]))
    return Offer(**{**values, "gpus": gpus})


def _deployment(row: Row[tuple[object, ...]]) -> Deployment:
    values = dict(row._mapping)
    return Deployment(
        **{**values, "mode": Mode(values["mode"]), "state": DeploymentState(values["state"])}
    )
