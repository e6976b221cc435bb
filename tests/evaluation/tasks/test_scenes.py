import pytest
import torch
from support.tiny import TOKENIZER_MODEL

from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.model.beta_clip import ModelConfig, create_model
from betaclip.model.tokenizer import Tokenizer


def test_scenes():
    """An untrained model guesses; nothing of the model or of random states changes."""
    model = create_model(ModelConfig(name=TOKENIZER_MODEL))
    model.pool.eval()
    states = torch.get_rng_state()
    found = evaluate_scenes(model, Tokenizer(), seed=1, count=40, batch_size=16)
    assert torch.equal(states, torch.get_rng_state())
    assert model.training and not model.pool.training and all(p.grad is None for p in model.parameters())
    assert found["retrieval/images"] == found["choices/hard_questions"] == 40
    for difficulty in ("hard", "medium", "easy", "trivial"):
        assert 0 <= found[f"choices/{difficulty}"] < 0.5
        assert found[f"choices/{difficulty}_chance"] < 0.2
    assert found["retrieval/t2i_r1"] < 0.3 and found["retrieval/conditioned_i2t_r1"] < 0.3
    assert 0.8 < found["pointing/ratio"] < 1.2
    assert 30 < found["leak/texts"] <= 40 and 0 <= found["leak/other_picture"] <= found["leak/own_picture"] + 0.2
    assert found == evaluate_scenes(model, Tokenizer(), seed=1, count=40, batch_size=16)
    assert found != evaluate_scenes(model, Tokenizer(), seed=2, count=40, batch_size=16)
    with pytest.raises(ValueError, match="at least one scene"):
        evaluate_scenes(model, Tokenizer(), seed=1, count=0)
