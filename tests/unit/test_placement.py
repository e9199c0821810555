from dataclasses import replace

import pytest

from market import catalog
from market.catalog import find, models
from market.cluster.hardware import parse_gpus
from market.placement import Misfit, Placement, place, that_fit
from market.types import Deployment, DeploymentState, Gpu, Mode, Offer
from tests.samples import NOON

LAPTOP = Offer("local", "local", "local", "cpu", (), 8, 16_000, 0, "USD")
SERVER = replace(
    LAPTOP,
    offer_id="server",
    gpu_type="a10",
    gpus=(Gpu(0, "a10", 24_564), Gpu(1, "a10", 24_564)),
)


def deployed(number, gpu_milli, offer_id="server"):
    return Deployment(
        f"d{number}", "qwen-7b", Mode.TOKENS, "vllm", 1, offer_id, gpu_milli,
        DeploymentState.READY, "", NOON,
    )  # fmt: skip


class TestCatalog:
    def test_has_the_tiny_model_and_a_dozen_real_ones(self):
        assert len(models()) >= 13
        assert find("qwen-7b").source == "Qwen/Qwen2.5-7B-Instruct"

    def test_every_model_has_an_exact_price(self):
        for card in catalog.default_rate_cards():
            assert 0 < card.cached_input_pico <= card.input_pico <= card.output_pico

    def test_weights_are_two_bytes_per_parameter_or_four(self):
        for model in models():
            assert 1.95 < model.weights_bytes / model.parameters < 4.1, model.name

    def test_unknown_model_proposes_close_names(self):
        with pytest.raises(catalog.NotFound, match="qwen-7b"):
            find("qwen7b")


class TestPlace:
    def test_small_model_runs_on_a_cpu(self):
        assert place(find("tiny-qwen"), [LAPTOP], [], ()) == Placement(LAPTOP, 0)

    def test_big_model_says_what_is_missing_and_what_would_fit(self):
        fitting = that_fit(models(), [LAPTOP], [])
        misfit = place(find("qwen-7b"), [LAPTOP], [], fitting)
        assert isinstance(misfit, Misfit)
        assert "needs 1 GPU with 17 GiB free; this cluster has none" in misfit.reason
        assert "what would fit: tiny-qwen" in misfit.reason

    def test_gpu_is_preferred_and_its_share_follows_from_memory(self):
        placed = place(find("qwen-7b"), [LAPTOP, SERVER], [], ())
        assert placed == Placement(SERVER, 706)

    def test_second_copy_goes_to_the_second_gpu_and_the_third_nowhere(self):
        model = find("qwen-7b")
        assert isinstance(place(model, [SERVER], [deployed(1, 706)], ()), Placement)
        full = [deployed(1, 706), deployed(2, 706)]
        misfit = place(model, [SERVER], full, ())
        assert isinstance(misfit, Misfit)
        assert "the freest of this cluster's 2 has 7 GiB" in misfit.reason

    def test_shares_of_one_gpu_never_exceed_it(self):
        model, current = find("qwen-0.5b"), []
        while isinstance(placed := place(model, [SERVER], current, ()), Placement):
            current.append(deployed(len(current), placed.gpu_milli))
        assert len(current) == 2 * (1000 // current[0].gpu_milli)

    def test_replicas_must_all_find_room(self):
        assert isinstance(place(find("qwen-7b"), [SERVER], [], (), replicas=2), Placement)
        misfit = place(find("qwen-7b"), [SERVER], [], (), replicas=3)
        assert isinstance(misfit, Misfit)
        assert "needs 3 times 1 GPU" in misfit.reason
        assert isinstance(place(find("tiny-qwen"), [LAPTOP], [], (), replicas=16), Misfit)

    def test_memory_of_what_runs_already_is_taken(self):
        current = []
        while isinstance(place(find("tiny-qwen"), [LAPTOP], current, ()), Placement):
            number = len(current)
            current.append(replace(deployed(number, 0, "local"), model="tiny-qwen"))
        assert len(current) == LAPTOP.memory_mib // find("tiny-qwen").memory_mib

    def test_without_any_node_nothing_fits(self):
        assert isinstance(place(find("tiny-qwen"), [], [], ()), Misfit)


class TestHardware:
    LISTING = "0, NVIDIA H200, 143771\n1, NVIDIA A100-SXM4-80GB, 81920\n"

    def test_driver_listing_becomes_values(self):
        assert parse_gpus(self.LISTING, None) == (
            Gpu(0, "h200", 143_771),
            Gpu(1, "a100-sxm4-80gb", 81_920),
        )

    def test_hidden_gpus_are_left_out(self):
        assert [gpu.index for gpu in parse_gpus(self.LISTING, "1")] == [1]
        assert parse_gpus(self.LISTING, "") == ()
