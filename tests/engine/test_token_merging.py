"""Token merging: what it merges, and that a network made ready merges as the plain one does."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_networks import CONTEXT, SMALL, XL, error, normal, unet

from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.prepare import Recipe, prepare_unet
from mlx_maple.engine.prepared_forms import set_form
from mlx_maple.models import token_merging
from mlx_maple.models.forms import PLAIN, Form
from mlx_maple.models.freeu import Factors, set_freeu
from mlx_maple.models.token_merging import match, set_token_merging

SAME, OTHER = 1e-4, 1e-2


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def inputs():
    return normal(2, 9, 7, 4, seed=7), mx.array([400.0]), normal(2, 9, CONTEXT, seed=5)


def test_tokens_that_are_alike_are_merged_and_come_back():
    """Four colours, one a quarter: what is merged is of one colour, and nothing changes."""
    colours = np.eye(4, dtype=np.float32)[np.repeat(np.repeat([[0, 1], [2, 3]], 2, 0), 2, 1)]
    x = mx.array(colours.reshape(1, 16, 4))
    found = match(x, 4, 4, 0.75)
    assert found is not None
    left = found.merge(x)
    assert left.shape == (1, 4, 4)
    assert np.allclose(np.sort(np.array(left)[0], axis=0)[-1], 1)
    assert np.array_equal(np.array(found.unmerge(left)), np.array(x))


def test_a_target_becomes_the_mean_of_all_that_join_it():
    x = mx.array([[[1.0, 0], [2.0, 0], [3.0, 0], [0, 5.0]]])  # one cell; the last is unlike
    found = match(x, 2, 2, 0.5)
    assert found is not None
    assert np.array(found.merge(x)).tolist() == [[[0, 5], [2, 0]]]
    assert np.array(found.unmerge(found.merge(x))).tolist() == [[[2, 0], [2, 0], [2, 0], [0, 5]]]


def test_thousands_that_join_one_do_not_overflow_a_half():
    x = mx.broadcast_to(mx.array([[[20.0, 0]]]), (1, 128 * 64, 2)).astype(mx.float16)
    found = match(x, 128, 64, 0.75)
    assert found is not None and len(set(np.array(found.into)[0].tolist())) == 1
    assert np.allclose(np.array(found.unmerge(found.merge(x))), np.array(x), rtol=5e-3)


@pytest.mark.parametrize(("rows", "columns", "ratio"), [(4, 4, 0.05), (1, 9, 0.5), (5, 1, 0.7)])
def test_where_there_is_nothing_to_merge(rows, columns, ratio):
    assert match(normal(1, rows * columns, 3), rows, columns, ratio) is None


def test_in_parts_it_is_the_same(monkeypatch):
    x = normal(2, 63, 8)

    def merged():
        found = match(x, 9, 7, 0.6)
        assert found is not None
        return np.array(found.unmerge(found.merge(x)))

    whole = merged()
    monkeypatch.setattr(token_merging, "SCORE_BYTES", 500)
    assert np.allclose(merged(), whole, atol=1e-6)
    monkeypatch.setattr(token_merging, "_in_parts", lambda numbers, _: [numbers[:5]])
    with pytest.raises(ValueError):  # the control: it is in parts indeed
        merged()


@pytest.mark.parametrize(("facts", "compiles"), [(SMALL, False), (SMALL, True), (XL, False)])
def test_a_network_made_ready_merges_as_the_plain_one(facts, compiles):
    plain = unet(**facts)
    ready = prepare_unet(plain, Recipe("cpu", Plain()))
    ready.steps = GuidedSteps(ready, compiles=compiles)
    x, time, context = inputs()

    def drawn():
        return ready.steps.model(context, None, 1, [400.0])(x, 400.0)

    before, first = plain(x, time, context), ready.steps
    assert error(drawn(), before) < SAME
    for ratio in (0.5, 0.3):
        set_token_merging(plain, ratio)
        set_form(ready, Form(merging=ratio))
        wanted = plain(x, time, context)
        assert error(drawn(), wanted) < SAME
        assert error(ready(x, time, context), wanted) < SAME
        assert error(wanted, before) > OTHER
    set_form(ready, PLAIN)
    assert ready.steps is first  # not traced again
    assert error(drawn(), before) < SAME


def test_it_is_taken_back_bit_for_bit_also_with_freeu():
    plain = unet(**SMALL)
    names = [name for name, _ in tree_flatten(plain.parameters())]
    before = np.array(plain(*inputs()))
    set_freeu(plain, Factors(1.5, 1.6, 0.9, 0.2))
    set_token_merging(plain, 0.5)
    assert sorted(names) == sorted(name for name, _ in tree_flatten(plain.parameters()))
    set_freeu(plain, None)
    merged = np.array(plain(*inputs()))
    assert not np.allclose(merged, before, atol=1e-3)
    set_token_merging(plain, 0)
    assert np.array_equal(np.array(plain(*inputs())), before)


def test_only_the_finest_level_merges():
    """A level below changes nothing: without its own transformers the finest one is as it was."""
    plain = unet(**XL)
    merging = [
        isinstance(layer, token_merging.MergingTransformer)
        for block in (set_token_merging(plain, 0.5), *plain.down_blocks)[1:]
        for layer in block.get("attentions", [])
    ]
    assert merging == [True, True, False, False]
    assert not isinstance(plain.mid_block.attentions[0], token_merging.MergingTransformer)
