import torch
from tiny_chain import fit_artifact, tiny_llama, tokens

from pqkv_cli.evaluation.held_out import held_out_losses
from pqkv_cli.evaluation.text_windows import diverge
from pqkv_cli.quantizers.codec import ExactCodec
from pqkv_cli.runtime import load
from pqkv_cli.runtime.attach import artifact_codecs, simulate


def test_losses_of_exact_and_quantized_caches(tmp_path) -> None:
    model = tiny_llama()
    codecs = artifact_codecs(load(fit_artifact(model, tmp_path)))
    exact = {"keys": ExactCodec(), "values": ExactCodec()}
    choices = [[exact, exact], [None, None], codecs, [codecs[0], exact], [exact, codecs[1]]]
    windows, seen = tokens(2, 48, seed=5), []
    losses = held_out_losses(model, windows, choices, lambda *n: seen.append(n))
    assert seen == [(1, 2), (2, 2)]
    assert bool((losses[:, :2] < 1e-9).all()) and bool((losses[:, 2:] > 0).all())
    # One layer alone costs less than both, and the parts come to about the whole.
    parts = losses[:, 3] + losses[:, 4]
    assert torch.allclose(parts, losses[:, 2], rtol=0.5)


def test_loss_is_that_of_a_forward_through_the_simulated_cache(tmp_path) -> None:
    model = tiny_llama()
    codecs = artifact_codecs(load(fit_artifact(model, tmp_path)))
    window = tokens(1, 40, seed=6)
    with torch.no_grad(), simulate(model, codecs) as simulation:
        quantized = model(window, past_key_values=simulation.new_cache()).logits[0, :-1]
        baseline = model(window).logits[0, :-1]
    expected = diverge(baseline, quantized, window[0, 1:]).kl_bits.mean()
    assert torch.allclose(held_out_losses(model, window, [codecs])[0, 0], expected)
