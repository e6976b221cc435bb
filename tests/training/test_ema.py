import pytest
import torch
from support.ranks import needs_gloo, processes
from support.steps import assert_same, config, create_step, parameters
from support.tiny import tiny_batch, tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from betaclip.process_group import ProcessGroup
from betaclip.training import parallel
from betaclip.training.ema import WeightAverage


def test_equals_pytorchs():
    """That of a model with buffers and a frozen part, over three updates."""
    model = tiny_model()
    model.clip.visual.conv1.requires_grad_(False)
    ours = WeightAverage(model, 0.6)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    theirs.n_averaged += 1  # its average starts from the weights before the first update, as ours does
    train_step = create_step(model, config())
    for step in range(3):
        train_step(tiny_batch(4), step, 4)
        ours.update()
        theirs.update_parameters(model)
    raw = parameters(model)
    with ours.applied():
        assert_same(parameters(model), parameters(theirs.module), 0)
        assert not torch.equal(model.pool.mlp.c_fc.weight, raw["pool.mlp.c_fc.weight"])
    assert_same(parameters(model), raw, 0)
    state = ours.state()
    assert "clip.visual.conv1.weight" not in state and "pool.logit_scale" in state
    assert_same(state, {name: value for name, value in parameters(theirs.module).items() if name in state}, 0)
    assert_same(parameters(model), raw, 0)


def test_restore():
    model, other = tiny_model(), tiny_model(seed=1)
    ours, theirs = WeightAverage(model, 0.9), WeightAverage(other, 0.9)
    ours.restore(model.state_dict() | theirs.state())
    assert_same(ours.state(), parameters(other), 0)
    assert_same(parameters(model), parameters(tiny_model()), 0)


def test_weights_come_back_after_an_error():
    model = tiny_model()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.pool.logit_scale.fill_(1.0)
    with pytest.raises(RuntimeError, match="an evaluation failed"), average.applied():
        raise RuntimeError("an evaluation failed")
    assert model.pool.logit_scale.item() == 1.0


def sharded_equals_whole() -> None:
    """The average is sharded as the weights are. Encoding takes those that apply, though it leaves gathered ones."""
    images, alone, model = tiny_batch(3).images, tiny_model(), tiny_model()
    parallel.wrap(model, "fsdp", ProcessGroup.of())
    averages = [WeightAverage(one, 0.5) for one in (alone, model)]
    with torch.no_grad():
        for one in (alone, model):
            for parameter in one.parameters():
                parameter.add_(0.1)
        for average in averages:
            average.update()
        outs = []
        for one, average in zip((alone, model), averages, strict=True):
            raw = one.encode_image(images)[0]
            with average.applied():
                averaged = one.encode_image(images)[0]
            outs.append((raw, averaged, one.encode_image(images)[0]))
        for ours, truth in zip(outs[1], outs[0], strict=True):
            torch.testing.assert_close(ours, truth)
        assert not torch.allclose(outs[0][0], outs[0][1], atol=1e-3)
        state = averages[1].state()
        if ProcessGroup.of().is_first:
            assert_same(state, averages[0].state(), 1e-6)
        raised = {name: value + 1 for name, value in averages[0].state().items()}
        averages[1].restore(alone.state_dict() | raised)
        state = averages[1].state()
        if ProcessGroup.of().is_first:
            assert_same(state, raised, 1e-6)


@needs_gloo
def test_sharded_equals_whole(tmp_path):
    processes(2, sharded_equals_whole, tmp_path)
