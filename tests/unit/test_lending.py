"""Whose turn it is on a lease's replica."""

import asyncio

import pytest

from market.errors import Revoked
from serve_apps.lending import Lending


async def test_holder_and_borrowers_alone_are_left_in_peace():
    lending = Lending()
    async with lending.turn(borrowed=False), lending.turn(borrowed=False):
        pass
    async with lending.turn(borrowed=True), lending.turn(borrowed=True):
        await asyncio.sleep(0)


async def test_borrower_is_refused_while_the_holder_is_there():
    lending = Lending()
    async with lending.turn(borrowed=False):
        with pytest.raises(Revoked):
            async with lending.turn(borrowed=True):
                raise AssertionError
    async with lending.turn(borrowed=True):
        pass


async def test_all_borrowers_are_out_before_the_holders_first_step():
    lending, steps = Lending(), []

    async def borrow(name):
        try:
            async with lending.turn(borrowed=True):
                steps.append(f"{name} in")
                await asyncio.Event().wait()
        except Revoked:
            steps.append(f"{name} out")

    borrowers = [asyncio.create_task(borrow(name)) for name in ("a", "b")]
    await asyncio.sleep(0)
    async with lending.turn(borrowed=False):
        for _ in range(3):  # turns of the loop, not time
            await asyncio.sleep(0)
        assert sorted(steps) == ["a in", "a out", "b in", "b out"]
    await asyncio.gather(*borrowers)


async def test_a_borrowers_own_timeout_is_its_own():
    lending = Lending()
    with pytest.raises(TimeoutError):
        async with lending.turn(borrowed=True):
            raise TimeoutError
    async with lending.turn(borrowed=False):
        pass


async def test_one_that_hangs_up_is_forgotten():
    lending = Lending()

    async def borrow():
        async with lending.turn(borrowed=True):
            await asyncio.Event().wait()

    task = asyncio.create_task(borrow())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with lending.turn(borrowed=False):
        await asyncio.sleep(0)


async def test_holders_that_come_while_borrowers_are_leaving():
    """Some need a few turns to leave: the second request must not fail on their way out."""
    lending = Lending()

    async def borrow():
        async with lending.turn(borrowed=True):
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(3):
                    await asyncio.sleep(0)

    borrower = asyncio.create_task(borrow())
    await asyncio.sleep(0)
    async with lending.turn(borrowed=False):
        await asyncio.sleep(0)
        async with lending.turn(borrowed=False):
            await asyncio.sleep(0)
    with pytest.raises(Revoked):
        await borrower
    async with lending.turn(borrowed=True):
        pass


async def test_closed_it_lends_nothing():
    lending = Lending()
    lending.close()
    with pytest.raises(Revoked):
        async with lending.turn(borrowed=True):
            raise AssertionError
