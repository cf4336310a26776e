"""The correlation of neighbouring layers' gradients, against brute force on a model in which nothing is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.sharing import GradientAgreement, MeanGradient, correlations, neighbours
from tests.growth.networks import Layer, Residual, arrangement_of, untied

LEADERS = [(0, 0, 0, 0, 0, 0), (0, 1, 0, 1, 0, 1), (0, 0, 0, 3, 4, 4), (0, 1, 2, 3, 4, 5), (0, 1, 2)]


def by_brute_force(network: Residual, pairs: list[tuple[int, int]], batch: Tensor) -> list[float]:
    reference = untied(network)
    reference(batch).square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in reference.layers]
    return [torch.cosine_similarity(gradients[a], gradients[b], dim=0).item() for a, b in pairs]


def measured(network: nn.Module, arrangement: LayerArrangement, batch: Tensor) -> list[float]:
    agreement = GradientAgreement(arrangement)
    with agreement.watch():
        network(batch).square().sum().backward()
    return correlations(agreement.products(neighbours(arrangement.leaders)))


@pytest.mark.parametrize("leaders", LEADERS)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_correlations_are_those_of_an_untied_model_g5(
    leaders: tuple[int, ...], reentrant: bool | None, averaged: bool, batch: Tensor
) -> None:
    network = Residual(6, reentrant=reentrant).double()
    arrangement = arrangement_of(network)
    arrangement.arrange(leaders)
    if averaged:
        MeanGradient().attach(arrangement)
    batch.requires_grad_()
    expected = by_brute_force(network, neighbours(leaders), batch)
    assert measured(network, arrangement, batch) == pytest.approx(expected, abs=1e-5)


def test_two_stacks_are_correlated_together_g5(batch: Tensor) -> None:
    """Layer ``i`` of the encoder and of the decoder count as one layer."""
    model = nn.ModuleDict({"a": Residual(3), "b": Residual(3)}).double()
    arrangement = arrangement_of(model, "layers.*")
    arrangement.arrange((0, 0, 0))
    reference = untied(model)
    agreement = GradientAgreement(arrangement)
    with agreement.watch():
        (model["a"](batch).square().sum() + 3 * model["b"](batch).square().sum()).backward()
    (reference["a"](batch).square().sum() + 3 * reference["b"](batch).square().sum()).backward()
    flat = [
        torch.cat([p.grad.flatten() for side in "ab" for p in reference[side].layers[i].parameters()]) for i in range(3)
    ]
    expected = [torch.cosine_similarity(flat[i], flat[i + 1], dim=0).item() for i in range(2)]
    assert correlations(agreement.products([(0, 1), (1, 2)])) == pytest.approx(expected, abs=1e-5)


def test_watching_changes_no_gradient_and_gives_back_the_same_objects_g5(shared_net: tuple, batch: Tensor) -> None:
    network, arrangement = shared_net
    before = dict(network.named_parameters(remove_duplicate=False))
    network(batch).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    measured(network, arrangement, batch)
    after = dict(network.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    for name, gradient in plain.items():
        torch.testing.assert_close(network.get_parameter(name).grad, gradient, rtol=1e-13, atol=1e-15)


def test_parameters_come_back_after_an_error_too_g5(shared_net: tuple) -> None:
    network, arrangement = shared_net
    before = dict(network.named_parameters(remove_duplicate=False))
    watch = GradientAgreement(arrangement).watch()
    with pytest.raises(RuntimeError), watch:
        network(torch.zeros(2, 99, dtype=torch.float64))
    after = dict(network.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


def test_accumulated_backwards_under_one_watch_add_up_their_products_g5(shared_net: tuple, batch: Tensor) -> None:
    network, arrangement = shared_net
    pairs = neighbours(arrangement.leaders)
    one, two = GradientAgreement(arrangement), GradientAgreement(arrangement)
    with one.watch():
        network(batch).square().sum().backward()
    with two.watch():
        network(batch).square().sum().backward()
        network(batch).square().sum().backward()
    torch.testing.assert_close(two.products(pairs), 2 * one.products(pairs))


def test_frozen_parameters_are_left_out_g5(batch: Tensor) -> None:
    network = Residual(3).double()
    for layer in network.layers:
        layer.norm.requires_grad_(False)
    reference = untied(network)
    reference(batch).square().sum().backward()
    flat = [torch.cat([p.grad.flatten() for p in layer.linear.parameters()]) for layer in reference.layers]
    expected = [torch.cosine_similarity(flat[i], flat[i + 1], dim=0).item() for i in range(2)]
    assert measured(network, arrangement_of(network), batch) == pytest.approx(expected, abs=1e-5)


def test_a_pair_without_gradients_counts_as_agreeing_g5() -> None:
    assert correlations(torch.zeros(2, 3)) == [1.0, 1.0]
    assert correlations(torch.tensor([[-2.0, 1.0, 4.0]])) == [-1.0]


def test_a_single_live_layer_has_no_pairs_g5() -> None:
    arrangement = arrangement_of(Residual(2, layer=Layer))
    arrangement.arrange((0,))
    assert correlations(GradientAgreement(arrangement).products(neighbours((0,)))) == []
